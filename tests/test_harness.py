"""lm-evaluation-harness on a tiny GPT: on the same records it must tell what our own evals do, and generate what our own generation does.

Needs the extra harness (`pip install -e .[harness]`; pytest -m parity). Tasks are local files; nothing is fetched.
"""

import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

from ptm import evaluate, weights
from ptm.evals import scoring
from ptm.fields import ConfigError
from ptm.generate.options import Options
from ptm.generate.text import complete

pytestmark = pytest.mark.parity
RECORDS = 24
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_until": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_drawn": {
        "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "max_gen_toks": 6, "do_sample": True, "temperature": 3.0, "top_k": 40},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("harness")


@pytest.fixture(scope="module")
def workdir(folder):
    """A decoder with large random parameters, so that texts differ, whose rows are shorter than some texts, and its positions than one."""
    large = {"data__length": 32, "model__max_length": 64, "model__init_std": 0.4}
    cfg = runs.tiny("concat", text=runs.corpus(folder / "corpus.txt"), train__steps=2, train__microbatches=1, **large)
    assert runs.run(cfg, folder / "run") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return weights.load(f"ckpt:{workdir}", devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def records(folder, model):
    """Texts of one to thirty words, choices of unequal length, the right number, and an answer that our generation gives for two of three."""
    rng = random.Random(3)
    found = []
    for n in range(RECORDS):
        choices = [" ".join(rng.choices(runs.WORDS, k=rng.randint(1, 4))) for _ in range(3)]
        found.append({"text": " ".join(rng.choices(runs.WORDS, k=30 if n == 5 else rng.randint(1, 4))), "choices": choices, "label": n % 3})
    run, params = model
    options = Options(max_new_tokens=9, stop=("e", "\n"), too_long="cut")
    made = complete(run.model, params, run.tokenizer, [item["text"] for item in found], options=options, frame=run.prompt_frame)
    for n, (best, *_) in enumerate(made):
        found[n]["answer"] = best.text if n % 3 else "another"
    (folder / "records.jsonl").write_text("".join(json.dumps(item) + "\n" for item in found), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def tasks(folder, records):
    """The folder of the tasks; JSON is YAML too."""
    (folder / "tasks").mkdir()
    files = {"data_files": {"test": str(folder / "records.jsonl")}, "cache_dir": str(folder / "cache")}
    where = {"dataset_path": "json", "test_split": "test", "dataset_kwargs": files}
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **where, **task}))
    return folder / "tasks"


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: first)
        from ptm import harness

        yield harness


@pytest.fixture(scope="module")
def results(harness, workdir, tasks):
    """What the harness tells of all tasks in one call, the model being named as on its command line."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model="ptm", model_args=f"pretrained=ckpt:{workdir}", tasks=list(TASKS), batch_size=8, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )  # fmt: skip


def ours(name, workdir, folder, **changes):
    """The figures of one of our evals on the records."""
    columns = "text=text,choices=choices,label=label" if name == "choice" else "text=text"
    keys = {"source": f"jsonl:{folder}/records.jsonl", "columns": columns, "batch_size": "8", **changes}
    found = evaluate.evaluate(f"ckpt:{workdir}", names=(name,), overrides={f"evals.{name}.{key}": value for key, value in keys.items()})
    return {key.removeprefix(f"{name}/"): value for key, value in found.items()}


def test_multiple_choice_is_the_eval_choice(results, workdir, folder, records):
    """Both accuracies, and the log-likelihood of every choice."""
    found, expected = results["results"]["tiny_choice"], ours("choice", workdir, folder)
    assert found["acc,none"] == expected["accuracy"] and found["acc_norm,none"] == expected["accuracy_per_byte"]
    assert 0.1 < found["acc,none"] < 0.9 and found["sample_len"] == RECORDS
    listed = [json.loads(line) for line in next((workdir / "predictions").glob("choice-*.jsonl")).read_text().splitlines()]
    theirs = [[answer[0] for answer in sample["filtered_resps"]] for sample in results["samples"]["tiny_choice"]]
    print("largest difference of a log-likelihood", np.max(np.abs(np.array(theirs, float) - [row["log_likelihoods"] for row in listed])))
    np.testing.assert_allclose(np.array(theirs, float), [row["log_likelihoods"] for row in listed], rtol=1e-6)


def test_rolling_is_the_eval_perplexity(results, workdir, folder, records):
    """Long texts too, each token once."""
    found, expected = results["results"]["tiny_rolling"], ours("perplexity", workdir, folder)
    assert found["word_perplexity,none"] == pytest.approx(expected["word_perplexity"], rel=1e-6)
    assert found["bits_per_byte,none"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
    assert found["byte_perplexity,none"] == pytest.approx(2 ** expected["bits_per_byte"], rel=1e-6)


def test_windows_are_those_that_are_asked_for(harness, workdir, model, records):
    """And no other windows give the same."""
    from lm_eval.api.instance import Instance

    text, (run, params) = records[5]["text"], model
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    models = (harness.PtmLM(f"ckpt:{workdir}", batch_size=4, **windows) for windows in ({}, {"length": 16, "stride": 4}))
    found = [lm.loglikelihood_rolling(asked, disable_tqdm=True)[0] for lm in models]
    (expected,) = scoring.log_likelihoods(run, params, [text], batch_size=4, length=16, stride=4)
    assert found[1] == pytest.approx(expected.total, rel=1e-6) and abs(found[0] - found[1]) > 1e-3 * abs(found[1])


def test_answers_are_those_of_our_generation(results, records):
    """Each answer in its place, cut before the first stop text; of those that the file has as they are two in three."""
    found = [sample["filtered_resps"][0] for sample in results["samples"]["tiny_until"]]
    assert all(text == item["answer"] for n, (text, item) in enumerate(zip(found, records)) if n % 3)
    assert not any("e" in text or "\n" in text for text in found) and len(set(found)) > 3
    assert results["results"]["tiny_until"]["exact_match,none"] == pytest.approx(2 / 3)
    drawn = [sample["filtered_resps"][0] for sample in results["samples"]["tiny_drawn"]]
    assert drawn != found and len(set(drawn)) > RECORDS // 2


def test_prompts_with_different_settings_keep_their_order(harness, workdir):
    from lm_eval.api.instance import Instance

    lm = harness.PtmLM(f"ckpt:{workdir}", batch_size=4)
    short = {"until": "e", "max_gen_toks": 3}
    asked = [("the", short), ("model", {"until": [], "max_new_tokens": 5}), ("of", short), ("model", {"max_tokens": 5})]
    requests = [Instance("generate_until", {}, arguments, n) for n, arguments in enumerate(asked)]
    found = lm.generate_until(requests, disable_tqdm=True)
    assert found[1] == found[3] and found[:1] + found[2:3] == lm.generate_until(requests[::2], disable_tqdm=True)
    assert lm.loglikelihood([], disable_tqdm=True) == [] and lm.generate_until([], disable_tqdm=True) == []


def test_chats_are_written_as_in_training(harness, workdir):
    lm = harness.PtmLM(f"ckpt:{workdir}")
    history = [{"role": "user", "content": "Hello."}]
    assert lm.apply_chat_template(history) == "user: Hello.\nassistant:"
    begun = [*history, {"role": "assistant", "content": "The"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False) == "user: Hello.\nassistant: The"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 3}, "generation_kwargs has top=3.*Did you mean 'top_p'"),
        ({"top_k": "many", "do_sample": True}, "generation_kwargs.top_k='many' has type str"),
        ({"max_gen_toks": 0}, "max_new_tokens=0 is out of range"),
    ],
)
def test_settings_that_are_not_known_are_refused(harness, workdir, settings, message):
    from lm_eval.api.instance import Instance

    lm = harness.PtmLM(f"ckpt:{workdir}")
    with pytest.raises(ConfigError, match=message):
        lm.generate_until([Instance("generate_until", {}, ("the", settings), 0)])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"batch_size": 0}, "1 or more rows"), ({"length": 99}, "length=99 is more than the model")]
)
def test_wrong_arguments_are_refused(harness, workdir, arguments, message):
    with pytest.raises(ConfigError, match=message):
        harness.PtmLM(f"ckpt:{workdir}", **arguments)


def test_encoder_decoders_score_what_follows_a_context(harness, folder):
    """As our scores do; a text alone is refused."""
    from lm_eval.api.instance import Instance

    cfg = runs.tiny("spans", text=folder / "corpus.txt", train__steps=2, train__microbatches=1)
    assert runs.run(cfg, folder / "spans") == 0
    lm = harness.PtmLM(f"ckpt:{folder}/spans", batch_size=4)
    texts = [("a word", " under the"), ("every small model", " must")]
    (first, greedy), second = lm.loglikelihood([Instance("loglikelihood", {}, text, n) for n, text in enumerate(texts)], disable_tqdm=True)
    run, params = weights.load(f"ckpt:{folder}/spans")
    expected = [scored.total for scored in scoring.log_likelihoods(run, params, texts, batch_size=4)]
    assert [first, second[0]] == expected and first != second[0] and greedy in (True, False)
    assert len(lm.generate_until([Instance("generate_until", {}, ("a word", {"until": [], "max_gen_toks": 4}), 0)], disable_tqdm=True)) == 1
    with pytest.raises(ConfigError, match="scores what follows a context"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("alone",), 0)], disable_tqdm=True)


def test_encoders_are_refused(harness, folder):
    assert runs.run(runs.tiny("mlm", text=folder / "corpus.txt", train__steps=2, train__microbatches=1), folder / "encoder") == 0
    with pytest.raises(ConfigError, match="fills blanks.*pseudo_perplexity, minimal_pairs"):
        harness.PtmLM(f"ckpt:{folder}/encoder")


def test_the_command(harness, workdir, tasks, folder):
    """In a process of its own, without a network."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", "ptm.harness", "--model", "ptm", "--tasks", "tiny_choice", "--include_path", str(tasks)]
    command += ["--output_path", str(folder / "out"), "--limit", "3"]
    done = subprocess.run([*command, "--model_args", f"pretrained=ckpt:{workdir}"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(next((folder / "out").rglob("results*.json")).read_text())
    assert "acc,none" in written["results"]["tiny_choice"] and written["config"]["model_name"] == f"ckpt:{workdir}"


def test_mistakes_are_told_in_one_line(harness, monkeypatch, capsys):
    """A model that is not there, and the extra that is not."""
    monkeypatch.setattr(harness, "cli_evaluate", lambda: harness.PtmLM("ckpt:nowhere"))
    assert harness.main() == 2 and capsys.readouterr().err.startswith("ptm: ")
    hidden = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module('ptm.harness', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("ptm: ptm.harness needs lm-evaluation-harness") and done.stderr.count("\n") == 1
