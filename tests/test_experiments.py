"""The studies that are shipped: every table at every scale is a valid study, arms differ in what they claim to, fits find what is known, the coordinate check tells."""

import importlib.util
import itertools
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from ptm import recipe, registry
from ptm.fields import ConfigError
from ptm.study import prepare, resolution

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
TABLES = {
    "quickstart": ("",), "bert": ("tasks", "masking"), "roberta": ("masking", "formats", "batch"), "albert": ("objective", "sharing", "embedding"),
    "electra": ("arms", "tying", "generator"), "t5": ("rate", "spans", "architecture", "objective"), "xlnet": ("",), "scaling": ("",), "mup": ("",),
}  # fmt: skip
SCALES = ("full", "small", "tiny")
SPECS = [f"{EXPERIMENTS}/{file}.py:{','.join(filter(None, (table, scale)))}" for file, tables in TABLES.items() for table in tables for scale in SCALES]
SHORT = {spec: spec.rpartition("/")[2] for spec in SPECS}


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    """Recipes name the data; whether it is there is another matter."""
    monkeypatch.setenv("PTM_DATA", str(tmp_path / "none"))


def loaded(name: str) -> types.ModuleType:
    """A file of experiments/ as a module."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def resolved(spec: str, tmp_path: Path):
    return prepare(spec, workdir=tmp_path / "study", write=False)


def test_every_study_file_is_known_here():
    files = {path.stem for path in EXPERIMENTS.glob("*.py") if "def get_study" in path.read_text(encoding="utf-8")}
    assert files == set(TABLES)


@pytest.mark.parametrize("spec", SPECS, ids=SHORT.values())
def test_every_table_is_a_study_at_every_scale(spec):
    study = resolution.load(spec)
    assert len(study.seeds) >= 3 and study.orderings
    assert all(entry.source for entry in (*study.published, *study.orderings))
    assert len({(entry.arm, entry.metric) for entry in study.published}) == len(study.published)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.endswith("tiny")], ids=[name for name in SHORT.values() if name.endswith("tiny")])
def test_tiny_studies_resolve(spec, tmp_path):
    record = resolved(spec, tmp_path)
    assert len(record.runs) >= len(record.arms)
    differences = [tuple(map(str, arm.difference.items())) for arm in record.arms]
    assert len(set(differences)) == len(record.arms), "two arms are the same"


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if not spec.endswith("tiny")], ids=[name for name in SHORT.values() if not name.endswith("tiny")])
def test_full_and_small_studies_resolve(spec, tmp_path):
    resolved(spec, tmp_path)


def test_arms_of_electra_have_equal_compute():
    """Steps times the FLOPs of a step, by ptm's own count of a whole step, differ by less than a hundredth."""
    spec = f"{EXPERIMENTS}/electra.py:arms,tiny"
    study = resolution.load(spec)
    spent = {}
    for arm in study.arms:
        config = recipe.load(f"{ROOT}/{arm.recipes['pretrain'] if arm.recipes else study.stages[0].recipe}")
        made = registry.resolve(config)
        objective = made.objective
        if "objective.arm" in arm.overrides:
            objective = type(objective)(**{**vars(objective), "arm": arm.overrides["objective.arm"]})
        model = type(made.model)(**{**vars(made.model), "vocab_size": made.tokenizer.vocab_size})
        lengths = objective.lengths(made.data.length)
        heads = (objective.heads,) if made.model.name == "electra" else ()
        spent[arm.name] = arm.overrides["train.steps"] * model.forward_flops(lengths, lengths["S"], *heads)
    assert max(spent.values()) / min(spent.values()) < 1.01, spent


@pytest.mark.parametrize("file", ["scaling", "mup"])
def test_feed_forward_layers_grow_with_the_width(file, tmp_path):
    """The size that is told of an arm, 12 times layers and square of the width, counts them as four times as wide."""
    configs = [run.config for run in resolved(f"{EXPERIMENTS}/{file}.py:tiny", tmp_path).runs.values()]
    assert len({config["model.width"] for config in configs}) > 1 and {config["model.mlp_width"] for config in configs} == {None}


def test_inputs_of_t5_fill_the_encoder_whatever_is_corrupted():
    study = resolution.load(f"{EXPERIMENTS}/t5.py:rate,tiny")
    lengths = {arm.name: arm.overrides["data.length"] for arm in study.arms}
    assert list(lengths.values()) == sorted(lengths.values()) and lengths["50 %"] > 2 * lengths["15 %"]


def law(flops: float, parameters: float) -> float:
    """Hoffmann et al. 2022, equation 10, as refitted by Besiroglu et al. 2024."""
    return 1.82 + 482 / parameters**0.348 + 2085 / (flops / 6 / parameters) ** 0.366


def runs_of(isoflop, *, noise: float, at=law, sizes=(1 / 4, 1 / 2, 1, 2, 4)) -> list:
    rng = np.random.default_rng(0)
    points = [(flops, size * 0.6 * (flops / 120) ** 0.5) for flops, size in itertools.product((6e18, 6e19, 6e20, 6e21), sizes)]
    return [isoflop.Runs(c, n, c / 6 / n, [at(c, n) + noise * rng.normal() for _ in range(3)]) for c, n in points]


def test_fit_finds_the_exponents_of_a_known_law():
    isoflop = loaded("isoflop")
    exact = isoflop.fit(runs_of(isoflop, noise=0.0), draws=10)
    expected = 0.366 / (0.348 + 0.366)
    assert exact.a[0] == pytest.approx(expected, abs=0.01) and exact.a[0] + exact.b[0] == pytest.approx(1.0, abs=1e-6)
    assert exact.a[1] == pytest.approx(exact.a[2]), "without noise no draw differs"
    noisy = isoflop.fit(runs_of(isoflop, noise=0.01), draws=200)
    assert noisy.a[1] < expected < noisy.a[2] and noisy.a[2] - noisy.a[1] > 0.01


def test_fit_draws_from_several_runs_alone():
    isoflop = loaded("isoflop")
    single = [entry._replace(losses=entry.losses[:1]) for entry in runs_of(isoflop, noise=0.01)]
    with pytest.raises(ConfigError, match="under two seeds"):
        isoflop.fit(single, draws=2)


def test_draws_without_exponents_are_counted():
    """Where valleys are hardly deeper than the noise, some draws have none."""
    isoflop = loaded("isoflop")
    shallow = runs_of(isoflop, noise=0.01, at=lambda c, n: 3e-3 * np.log(n / (c / 120) ** 0.5) ** 2)
    found = isoflop.fit(shallow, draws=200)
    assert 0 < found.draws < 200


def test_fit_leaves_out_budgets_without_a_valley():
    isoflop = loaded("isoflop")

    def falling(flops: float, parameters: float) -> float:
        return -np.log(parameters) if flops == 6e18 else law(flops, parameters)

    found = isoflop.fit(runs_of(isoflop, noise=0.0, at=falling), draws=2)
    assert set(found.valleys) == {6e19, 6e20, 6e21}
    with pytest.raises(ConfigError, match="0 of 4 budgets"):
        isoflop.fit(runs_of(isoflop, noise=0.0, at=lambda c, n: -np.log(n)), draws=2)


def test_best_rate_finds_the_bottom_of_a_known_valley():
    best_rate = loaded("best_rate")
    powers = [-10.0, -9.0, -8.0, -7.0, -6.0]
    rng = np.random.default_rng(0)
    valley = np.array([[2 + 0.1 * (power + 7.7) ** 2] * 3 for power in powers])
    exact = best_rate.best(powers, valley, draws=10)
    assert exact.power == pytest.approx(-7.7) and exact.loss == pytest.approx(2.0) and exact.low == exact.high and not exact.edge
    noisy = best_rate.best(powers, valley + 0.01 * rng.normal(size=valley.shape), draws=200)
    assert noisy.low <= noisy.power <= noisy.high and noisy.low < noisy.high
    assert best_rate.best(powers, np.array([[power] * 3 for power in powers]), draws=10)[::4] == (-10.0, True), "no bottom: the end of the grid, and marked"


def test_arms_of_the_narrowest_width_stand_for_both_parametrisations():
    study = loaded("mup")
    for scale in SCALES:
        points = study.get_points(scale)
        narrow, *others = study.SCALES[scale].widths
        assert all((point.parametrisations == (study.MUP, study.STANDARD)) == (point.width == narrow) for point in points.values())
        assert {point.overrides["mup.base_width"] for point in points.values() if point.parametrisations == (study.STANDARD,)} == {None}
        assert len(points) == len(study.SCALES[scale].rates) * (1 + 2 * len(others))


@pytest.mark.parametrize("kind", ["concat", pytest.param("mlm", marks=pytest.mark.slow)])
def test_coordinates_stay_under_mup_and_grow_in_the_standard_parametrisation(kind, tmp_path):
    """GPT and BERT, eight times as wide as their base: a few steps at a high rate."""
    check, text = loaded("coordinates"), runs.corpus(tmp_path / "corpus.txt")
    options = {
        "train__microbatches": 1, "train__ema_decay": None, "train__skip_sigma": None, "train__batch_size": 4, "data__streams": None,
        "model__init_std": 0.1, "model__dropout": 0.0, "optimizer__learning_rate": 0.02,
    }  # fmt: skip
    found = {}
    for base in (16, None):
        config = registry.resolve(runs.tiny(kind, text=text, **options, mup__base_width=base))
        found[base] = check.slopes(check.measure(config, (16, 128), steps=4, seeds=1, devices=jax.devices()[:1]))
    assert {name.split()[0] for name in found[16]} == {"residual", "attention", "output"}
    stays, told = check.verdict(found[16], tolerance=0.25)
    assert stays, told
    stays, told = check.verdict(found[None], tolerance=0.25)
    assert not stays and "grow with width" in told, told
    assert found[None]["attention"][-1] > 1 and found[None][f"output {'lm' if kind == 'concat' else 'mlm'}"][-1] > 0.4


def test_slopes_and_verdict_of_known_growth():
    check = loaded("coordinates")

    def rows(power: float) -> list:
        return [
            check.Row(width, seed, step, "residual 1", step * width**power * (1 + 0.1 * seed)) for width in (8, 16, 64) for seed in (0, 1) for step in (1, 2)
        ]

    for power, told in ((0.0, "stay: all"), (0.5, "1 of 1 grow with width, residual 1 the most, as width ** 0.50"), (-0.5, "1 of 1 shrink with width")):
        found = check.slopes(rows(power))
        assert found == {"residual 1": [pytest.approx(power, abs=1e-9)] * 2}
        stays, sentence = check.verdict(found, tolerance=0.25)
        assert stays == (power == 0.0) and told in sentence
    assert not check.verdict({"output lm": [float("nan")]}, tolerance=0.25)[0], "what is not finite does not stay"


def test_coordinates_are_written(tmp_path):
    check = loaded("coordinates")
    rows = [check.Row(width, 0, 1, "output lm", 1.0 / width) for width in (8, 16)]
    check.write(tmp_path / "out", rows, title="two widths")
    assert len((tmp_path / "out" / "coordinates.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    with pytest.raises(ConfigError, match="two widths or more"):
        check.main(["--config=none.py", "--widths=8"])
