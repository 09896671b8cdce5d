"""Settings of the whole test run and the processes it starts: eight CPU devices, one compile cache, quick instead of optimised compiles."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ledger
import pytest

os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"ptm-test-cache-{os.getuid()}"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Compiling is most of the time of small tests; `ptm train` itself runs with the defaults, as do the benchmarks.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

# Whole runs whose like are in the default suite; CI runs them as a suite of their own. File::test, with its parameters or for all of them.
RUNS = {
    "test_distillation.py::test_a_student_trains_beside_its_teacher", "test_distillation.py::test_a_teacher_that_is_gone_or_changed_is_missed",
    "test_distillation.py::test_a_stopped_student_ends_as_if_nothing_had_happened", "test_encoder_decoder.py::test_each_side_from_a_checkpoint_of_its_own",
    "test_encoder_decoder.py::test_a_warm_run_trains_and_goes_on_elsewhere", "test_labels.py::test_a_run_keeps_its_labels", "test_lora.py::test_on_eight_devices",
    "test_lora.py::test_who_uses_the_model_gets_plain_kernels", "test_resume.py::test_a_stopped_run_ends_as_if_nothing_had_happened[mlm]",
    "test_mixture.py::test_a_stopped_run_ends_as_if_nothing_had_happened", "test_permutation.py::test_a_stopped_run_goes_on_with_its_memory",
    "test_permutation.py::test_a_step_that_is_not_accepted_leaves_no_memory", "test_resume.py::test_signals_of_the_command_line", "test_resume.py::test_a_stopped_run_ends_as_if_nothing_had_happened[spans]",
    "test_resume.py::test_a_stopped_run_ends_as_if_nothing_had_happened[concat]", "test_resume.py::test_other_device_counts",
    "test_rtd.py::test_one_batch_is_overfit[all_tokens_mlm]", "test_run.py::test_a_checkpoint_is_read_on_devices_that_its_mesh_does_not_fit",
    "test_run.py::test_every_recipe_trains_saves_resumes_and_evaluates[bert]", "test_run.py::test_every_recipe_trains_saves_resumes_and_evaluates[shakespeare_char_cpu]",
    "test_run.py::test_every_recipe_trains_saves_resumes_and_evaluates[t5]", "test_seeds.py::test_runs_a_summary_and_what_is_finished",
    "test_seq2seq.py::test_it_learns_to_write_what_is_asked_for[t5]", "test_training.py::test_bfloat16_trains_near_float32",
    "test_training.py::test_one_batch_is_overfit[spans]", "test_training.py::test_one_batch_is_overfit[mlm]",
    "test_training.py::test_equal_configs_give_equal_runs_and_other_seeds_other_ones", "test_vocabulary.py::test_tables_grow_and_old_predictions_stay[spans]",
    "test_bad_records.py::test_a_run_past_bad_records_is_the_run_without_them", "test_skipped_steps.py::test_too_many_in_a_row_stop_the_run",
    "test_vocabulary.py::test_training_goes_on_from_the_old_loss",
    "test_compiles.py::test_whether_the_devices_wait_for_the_host[device]", "test_resume.py::test_a_crashed_run_ends_as_if_nothing_had_happened",
    "test_experiments.py::test_coordinates_stay_under_mup_and_grow_in_the_standard_parametrisation[concat]",
    "test_run.py::test_a_run_goes_on_when_the_checkpoint_it_began_from_is_gone", "test_training.py::test_a_sharded_run_is_the_run_of_one_device",
    "test_vocabulary.py::test_tables_grow_and_old_predictions_stay[mlm]", "test_watchdog.py::test_a_run_may_end_by_itself",
    "test_ledger.py::test_the_summary_of_a_run_of_tests", "test_skipped_steps.py::test_skipped_steps_are_steps_that_do_nothing[one]",
    "test_phases.py::test_a_stopped_run_ends_as_if_nothing_had_happened", "test_sources.py::test_a_run_of_two_sources",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults", "fault injection")
    group.addoption("--long", action="store_true", help="more of every fault; with -m faults all tests that tell of faults, whatever suite they are in")
    group.addoption("--ledger", metavar="FILE", help="write the table of faults as Markdown")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the long suite was asked for."""
    return request.config.getoption("long")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of faults, if a test told of any."""
    reports = [(report, kind != "failed") for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ()) if report.when == "call"]
    rows = ledger.table(ledger.Told(report.user_properties, passed) for report, passed in reports)
    if not rows:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(ledger.text(rows))
    if config.getoption("ledger"):
        Path(config.getoption("ledger")).write_text(ledger.text(rows, markdown=True) + "\n", encoding="utf-8")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of RUNS, and in the long suite those that tell of faults. Names that a file which is collected as a whole does not have are an error."""
    found = set()
    for item in items:
        if config.getoption("long") and "record_property" in item.fixturenames:
            item.add_marker("faults")
        name = f"{item.path.name}::{item.name}"
        for entry in {name, name.partition("[")[0]} & RUNS:
            item.add_marker("runs")
            found.add(entry)
    whole = {item.path.name for item in items if not any("::" in argument for argument in item.config.args)}
    if missing := {entry for entry in RUNS - found if entry.partition("::")[0] in whole}:
        raise pytest.UsageError(f"tests/conftest.py names tests that are not there: {', '.join(sorted(missing))}")


@pytest.fixture(scope="module")
def study_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The text that the recipes of tests/runs.py read, for the tests of studies."""
    import runs  # it loads JAX, which reads the settings above

    made = runs.corpus(tmp_path_factory.mktemp("text") / "corpus.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PTM_TEST_TEXT", str(made))
        yield made


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def watched(browser: Any) -> Iterator[Callable[..., tuple[Any, list[str], list[str]]]]:
    """Opens a page, a file or an address, in a window of a size: its tab, what it says (console, errors, dialogs), and what it asks for."""
    contexts = []

    def open_page(page: Path | str, *, width: int, height: int = 800) -> tuple[Any, list[str], list[str]]:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        tab = contexts[-1].new_page()
        said: list[str] = []
        asked: list[str] = []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: said.append("dialog"))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(page.as_uri() if isinstance(page, Path) else page)
        return tab, said, asked

    yield open_page
    for context in contexts:
        context.close()
