"""Recipes by name for GLUE, SuperGLUE, CLUE and other tasks: the official files as rows, the official metrics, and what is handed in."""

import dataclasses
import json
import os
import zipfile
from pathlib import Path

import pytest
import runs

from ptm import cli, labels, metrics, objectives, registry, submission, text
from ptm.config import Data
from ptm.data import sources
from ptm.data.batch import keyed_rng
from ptm.data.documents import Corpus
from ptm.fields import ConfigError
from ptm.metrics import grouped
from ptm.recipe import load

ROOT = Path(__file__).parent.parent
FINETUNE = ROOT / "configs/finetune"
TASKS = ROOT / "tests/data/tasks"
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli")
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
CLUE = ("afqmc", "tnews", "iflytek", "cmnli", "ocnli", "cluewsc", "csl", "cmrc2018", "chid", "c3")
BENCHMARKS = {"glue": GLUE, "superglue": SUPERGLUE, "clue": CLUE}
WORDS = [f"{name}.py:{word},test,tiny" for name, words in BENCHMARKS.items() for word in words]
WRITTEN = [f"{name}.py:{word},test,text,tiny" for name in ("glue", "superglue") for word in (*BENCHMARKS[name], "all")]
OTHERS = [
    "squad.py:squad1,tiny", "squad.py:squad2,tiny", "squad.py:xquad,tiny", "ner.py:tiny", "ner.py:wikigold,tiny", "ner.py:chinese,tiny", "translation.py:tiny",
    "summarization.py:tiny", "dialogue.py:tiny", "text.py:tiny", "text.py:regress,tiny",
]  # fmt: skip


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    return str(error.value)


def resolved(spec: str):
    return registry.resolve(load(f"{FINETUNE}/{spec}"))


def documents(data: Data, split: str) -> list:
    corpus = Corpus(data, split=split, tokenizer=text.make("bytes"))
    found = [corpus.document(source, record) for source, size in enumerate(corpus.sizes) for record in range(size)]
    return [doc for doc in found if doc is not None]


def shown(doc) -> str:
    """A document as a person reads it: its id, its text, and its other fields."""
    return f"{doc.id} | {text.make('bytes').decode(doc.tokens_L)} | " + " | ".join(f"{name}={value}" for name, value in doc.columns.items())


# First training record of each task, and the numbers of records for training, development and test.
ROWS = {
    "glue.py:cola": ("train.tsv:1 | The gardener watered the roses. | label=1", 5, 3, 3),
    "glue.py:sst2": ("train.tsv:2 | a warm and funny story  | label=1", 5, 3, 2),
    "glue.py:mrpc": ('train.tsv:2 | The mayor said , " We will rebuild . " | pair=The mayor said that the town would rebuild . | label=1', 4, 2, 2),
    "glue.py:stsb": ("train.tsv:2 | A dog runs on the beach. | pair=A dog is running along the shore. | label=4.800", 4, 3, 2),
    "glue.py:qqp": ("train.tsv:2 | How do I boil an egg? | pair=What is the way to boil eggs? | label=1", 4, 2, 2),  # a fifth row is cut off
    "glue.py:mnli": ("train.tsv:2 | He closed the door. | pair=The door was closed. | label=entailment", 4, 3, 2),
    "glue.py:qnli": ("train.tsv:2 | When was the mill built? | pair=The mill was built in 1802. | label=entailment", 4, 2, 2),
    "glue.py:rte": ("train.tsv:2 | The firm from Oslo sold its two ships. | pair=The firm sold ships. | label=entailment", 4, 2, 2),
    "glue.py:wnli": ("train.tsv:2 | The cup did not fit in the box because it was too big. | pair=The cup was too big. | label=1", 4, 2, 2),
    "glue.py:stsb,text": ("train.tsv:2 | stsb sentence1: A dog runs on the beach. sentence2: A dog is running along the shore. | target=4.8", 4, 3, 2),
    "glue.py:mrpc,text": (
        'train.tsv:2 | mrpc sentence1: The mayor said , " We will rebuild . " sentence2: The mayor said that the town would rebuild . | target=equivalent', 4, 2, 2,
    ),
    "glue.py:mnli,text": ("train.tsv:2 | mnli hypothesis: The door was closed. premise: He closed the door. | target=entailment", 4, 3, 2),
    "superglue.py:boolq": ("train.jsonl:1 | Moon -- The Moon is the only natural satellite of the Earth. | pair=is the moon a planet | label=false", 3, 2, 2),
    "superglue.py:cb": ("train.jsonl:1 | B: I think she said that the shop is open. | pair=the shop is open | label=entailment", 3, 3, 2),
    "superglue.py:copa": ("train.jsonl:1 | The glass fell. | pair=What happened as a result? | label=0 | choices=['It broke.', 'It rang.']", 3, 2, 2),
    "superglue.py:multirc": (
        "train.jsonl:0/0/0 | Ann bought two apples. Ben bought a pear. Then they went home. | pair=What did Ann buy? Two apples | group=0/0 | label=1", 7, 5, 3,
    ),
    "superglue.py:record": (
        "train.jsonl:0 | The bridge in @placeholder will cost ten million. | context=The mayor of Linz, Eva Holm, met the director of Nordbank on Monday.\n"
        "@highlight\n\nHolm wants a new bridge | answers=[{'text': 'Linz', 'answer_start': 13}]", 3, 1, 2,
    ),
    "superglue.py:record,text": (
        "train.jsonl:0 | record query: The bridge in @placeholder will cost ten million. entities: Linz, Eva Holm, Nordbank, Holm passage: The mayor of Linz, "
        "Eva Holm, met the director of Nordbank on Monday.\n@highlight\n\nHolm wants a new bridge | target=['Linz']", 3, 1, 2,
    ),
    "superglue.py:rte": ("train.jsonl:1 | The firm sold two ships. | pair=Ships were sold. | label=entailment", 2, 2, 2),
    "superglue.py:wic": ("train.jsonl:1 | bank: He sat on the bank of the river. | pair=The bank lent him money. | label=false", 3, 2, 2),
    "superglue.py:wsc": ("train.jsonl:0 | The cup did not fit in the box because *it* was too big. | pair=The cup | label=true", 3, 2, 2),
    "clue.py:afqmc": ("train.json:1 | 怎么还款 | pair=如何还钱 | label=1", 3, 2, 2),
    "clue.py:tnews": ("train.json:1 | 银行今天下调利率 | label=104", 3, 2, 2),
    "clue.py:iflytek": ("train.json:1 | 这是一款地图应用，可以导航。 | label=1", 3, 2, 2),
    "clue.py:cmnli": ("train.json:1 | 他关上了门。 | pair=门关了。 | label=entailment", 3, 2, 2),
    "clue.py:ocnli": ("train.50k.json:1 | 他关上了门。 | pair=门关了。 | label=entailment", 3, 2, 2),  # a fourth pair has no agreed label
    "clue.py:cluewsc": ("train.json:0 | 小明告诉小红*他*很高兴。 | pair=小明 | label=true", 3, 2, 2),
    "clue.py:csl": ("train.json:1 | 本文研究铜的导电性，给出一种测量方法。 | pair=铜；导电性 | label=1", 3, 2, 2),
    "clue.py:cmrc2018": (
        "train.json:TRAIN_0_QUERY_0 | 长城在哪里？ | context=长城位于中国北方，全长两万多公里。 | answers=[{'text': '中国北方', 'answer_start': 4}]", 2, 1, 2,
    ),
    "clue.py:chid": (
        "train.json:#idiom000001# | 城市的面貌____，令人惊叹。 | choices=['百尺竿头', '随波逐流', '方兴未艾', '身体力行', '一日千里', '三十而立', "
        "'逆水行舟', '日新月异', '百花齐放', '沧海一粟'] | label=7", 3, 1, 2,
    ),
    "clue.py:c3": ("d-train.json:1-1/0 | 女：你怎么来的？\n男：我坐火车来的。 | choices=['坐火车', '坐飞机', '开车'] | pair=男的怎么来的？ | label=坐火车", 4, 2, 1),
}  # fmt: skip


@pytest.mark.parametrize("spec", ROWS)
def test_official_files_become_rows(spec):
    """The first record of each format in readable text, the numbers of the others, and nothing that the test sets do not tell."""
    expected, training, development, tested = ROWS[spec]
    config = resolved(f"{spec},test,tiny")
    train, dev = documents(config.data, "train"), documents(config.data, "validation")
    assert shown(train[0]) == expected
    name = spec.partition(":")[2].partition(",")[0]
    tests = documents(config.evals[f"{name}_test"].data(config.data), "validation")
    assert (len(train), len(dev), len(tests)) == (training, development, tested)
    assert not any({"label", "answers", "target"} & set(doc.columns) for doc in tests)
    assert all({"label", "answers", "target"} & set(doc.columns) for doc in (*train, *dev))


@pytest.mark.parametrize("spec", [*WORDS, *WRITTEN, *OTHERS])
def test_every_record_is_read_by_its_objective(spec):
    """Examples come of all records, truth comes of those for learning, and right answers get the best value of every metric, which the config then looks for."""
    config = labels.filled(resolved(spec))
    tokenizer = text.make("bytes")
    objective = objectives.make(
        config.objective, tokenizer=tokenizer, length=config.data.length, packing="default", model_config=config.model
    )  # fmt: skip
    seen = {}
    for split, data in (("train", config.data), *((name, options.data(config.data)) for name, options in config.evals.items())):
        docs = documents(data, "train" if split == "train" else "validation")
        for doc in docs:
            assert list(objective.features(doc, rng=keyed_rng(0), draw=None)), doc.id
        references = [objective.reference(doc) for doc in docs]
        if split == "train" or not split.endswith("_test"):
            assert None not in references
        options = config.evals[split] if split != "train" else None
        if options is None or options.name != "task" or None in references:
            continue
        ours = [(right[0] if right else "") if isinstance(right, list) and objective.config.name in ("span_qa", "seq2seq") else right for right in references]
        groups = None if options.together is None else [doc.columns[options.together] for doc in docs]
        values = metrics.measure(options.metrics or objective.metrics, ours, references, groups=groups)
        seen |= {f"{split}/{metric}": value for metric, value in values.items()}
    if config.checkpoint.metric != "validation/loss":
        assert seen[config.checkpoint.metric] in (pytest.approx(1.0), pytest.approx(100.0))  # a share, or as published
    benchmark, word = spec.partition(".py:")[0], spec.partition(":")[2].partition(",")[0]
    if benchmark in BENCHMARKS and word != "all":
        task = submission.BENCHMARKS[benchmark].tasks[word]
        assert all(seen[metric] * factor == pytest.approx(100.0) for metric, factor in task), seen
        assert {f"{word}_test"} <= {test for test in submission.BENCHMARKS[benchmark].tests if test in config.evals}
        assert {name for name in config.evals if name.endswith("_test")} <= set(submission.BENCHMARKS[benchmark].tests)


def test_settings_follow_the_papers():
    """Steps from epochs and the number of texts, about 32 of them a step; what the words change."""
    sst2, roberta, electra = (load(f"{FINETUNE}/glue.py:sst2,{word}") for word in ("bert", "roberta", "electra_small"))
    assert sst2.train.steps * sst2.train.batch_size * 128 == pytest.approx(3 * 67349 * 13, rel=0.01)
    assert 28 < sst2.train.batch_size * 128 / 13 < 36
    assert (sst2.optimizer.learning_rate, sst2.schedule.warmup_steps) == (3e-5, round(0.1 * sst2.train.steps))
    assert roberta.train.steps == pytest.approx(10 / 3 * sst2.train.steps, rel=0.01) and roberta.optimizer.weight_decay == 0.1
    assert electra.optimizer.layerwise_decay == 0.8 and load(f"{FINETUNE}/glue.py:rte,electra").train.steps > 3 * load(f"{FINETUNE}/glue.py:rte").train.steps
    words = load(f"{FINETUNE}/glue.py:rte,text")
    assert (words.train.steps, words.train.batch_size, words.optimizer.name, words.schedule.name) == (2**18, 128, "adafactor", "constant")


def test_mixture_of_tasks_as_text():
    """Each source has its own template, weights are numbers of examples up to the limit, and each development set is measured by its own metric."""
    config = resolved("glue.py:all,tiny")
    assert config.data.weights[0] == 8551 and config.data.weights[5] == 2**16 and len(config.data.weights) == len(config.data.source) == 9
    found = documents(config.data, "train")
    assert {shown(doc).split(" | ")[1].split()[0] for doc in found} == set(GLUE)
    assert {doc.columns["target"] for doc in found if doc.id.startswith("0/")} == {"acceptable", "unacceptable"}
    assert config.evals["qqp"].metrics == ("f1_binary:duplicate", "accuracy") and config.evals["stsb"].metrics == ("pearson", "spearman")
    assert [shown(doc).split(" | ")[1].split()[0] for doc in documents(config.evals["rte"].data(config.data), "validation")] == ["rte", "rte"]
    assert "all has no recipe for electra" in refusal(load, f"{FINETUNE}/glue.py:all,electra")


def test_missing_folder_is_told(monkeypatch):
    monkeypatch.delenv("PTM_GLUE", raising=False)
    data = Data(source=tuple(load(f"{FINETUNE}/glue.py:sst2").data.source), columns=("text=sentence",))
    message = refusal(sources.open_source, data.source[0], data=data)
    assert "$PTM_GLUE/SST-2/train.tsv matches no file" in message and "set the environment variable PTM_GLUE" in message
    monkeypatch.setenv("PTM_GLUE", str(TASKS / "glue"))
    assert load(f"{FINETUNE}/glue.py:sst2").data.source == (f"tsv:{TASKS}/glue/SST-2/train.tsv",)


def opened(spec: str, *columns: str) -> sources.Source:
    return sources.open_source(spec, data=Data(source=(spec,), columns=columns))


def test_malformed_entries_are_named(tmp_path):
    """A line of another form is one bad record, and its neighbours are read; a file of another form is refused."""
    lines = (TASKS / "superglue/MultiRC/val.jsonl").read_text()
    (tmp_path / "m.jsonl").write_text('{"idx": 0}\n' + lines + "not JSON\n")
    source = opened(f"multirc:{tmp_path}/m.jsonl", "text=text", "pair={question} {answer}", "label={label}")
    corpus = Corpus(
        Data(source=(f"multirc:{tmp_path}/m.jsonl",), columns=("text=text", "label={label}"), validation_source=(f"multirc:{tmp_path}/m.jsonl",)), split="train"
    )
    assert [corpus.record(0, n) is not None for n in range(len(source))] == [False, True, True, True, True, True, False]
    assert [reason.partition(":")[2].split(" (")[0] for reason in corpus.describe_bad()] == ["line1: not of the form multirc", "line3: broken JSON"]
    (tmp_path / "c3.json").write_text('{"question": 1}')
    assert "is not in C3's format" in refusal(opened, f"c3:{tmp_path}/c3.json", "text=text")
    (tmp_path / "chid.json").write_text((TASKS / "clue/chid/dev.json").read_text())
    (tmp_path / "chid_answer.json").write_text("[1, 2]")
    corpus = Corpus(Data(source=(f"chid:{TASKS}/clue/chid/train.json",), columns=("text=text", "label=label"), holdout=0.0), split="train")
    assert [corpus.record(0, n)[1]["label"] for n in range(3)] == [7, 1, 3]
    assert "does not hold the answers of CHID" in refusal(opened, f"chid:{tmp_path}/chid.json", "text=text")


def test_dialogues_become_replies():
    """Each reply of the assistant is asked for after all that was said before."""
    source = opened(f"chat:{TASKS}/own/dialogues.jsonl", "text=text", "target=reply")
    assert [source.id(n) for n in range(3)] == ["dialogues.jsonl:1/1", "dialogues.jsonl:2/1", "dialogues.jsonl:2/3"]
    assert source.read(2) == {
        "text": "user: What is tea?\nassistant: A drink made of leaves.\nuser: And coffee?\nassistant:", "target": "A drink made of beans.",
    }  # fmt: skip


def test_lists_and_rounded_numbers_of_columns(tmp_path):
    (tmp_path / "a.tsv").write_text("q\tA\tB\tn\nwho\tAnn\tBen\t3.33\nwhy\tso\tno\tx\n")
    source = opened(f"tsv:{tmp_path}/a.tsv", "text=q", "choices.0=A", "choices.1={B}!", "label={n~0.2}")
    assert source.read(0) == {"text": "who", "choices": ["Ann", "Ben!"], "label": "3.4"}
    corpus = Corpus(Data(source=(f"tsv:{tmp_path}/a.tsv",), columns=("text=q", "label={n~0.2}"), holdout=0.0), split="train")
    assert corpus.record(0, 1) is None and "no number to be rounded" in corpus.describe_bad()[0]
    assert "{COLUMN~STEP}" in refusal(opened, f"tsv:{tmp_path}/a.tsv", "text=q", "label={n~0}")


def test_metrics_of_groups():
    """MultiRC's by hand: of 3 right answers 2 are found and one wrong one is taken; one of two questions is judged right in all its answers."""
    ours, theirs, groups = ["1", "0", "1", "1", "0"], ["1", "0", "1", "0", "1"], ["a", "a", "a", "b", "b"]
    assert grouped.multirc(ours, theirs, groups=groups) == {"f1a": pytest.approx(2 * 2 / (3 + 3)), "exact_match": 0.5}
    assert grouped.parity(["x", "x", "x", "y"], ["x", "y", "x", "y"], groups=[1, 1, 2, 2]) == {"parity": 0.5}
    assert metrics.measure(["multirc:True"], ["True", "no"], ["True", "True"], groups=[1, 2]) == {"f1a": pytest.approx(2 / 3), "exact_match": 0.5}
    assert "evals.EVAL.together" in refusal(metrics.measure, ["parity"], ["x"], ["x"])
    assert metrics.measure(["pearson"], ["1.0", "many", "3.0"], [1.0, -1.0, 3.0]) == {"pearson": pytest.approx(1.0)}
    assert metrics.measure(["squad"], ["the Linz", "Rome"], ["Linz", ["Oslo", "Rome"]]) == {"exact_match": 100.0, "f1": 100.0}


# Submissions.


def workdir(folder: Path, rows: list[dict], predictions: dict[str, list[dict]]) -> Path:
    (folder / "predictions").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, answers in predictions.items():
        (folder / "predictions" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    return folder


def answers(*predictions, ids=None, file="test.tsv", first=2) -> list[dict]:
    names = ids or range(first, first + len(predictions))
    return [{"id": f"{file}:{name}", "prediction": prediction, "reference": None} for name, prediction in zip(names, predictions)]


def submit(tmp_path, benchmark, **options):
    return submission.submit(benchmark=benchmark, runs=f"{tmp_path}/runs/*", output=str(tmp_path / "out"), **options)


def test_glue_table_and_files(tmp_path, capsys):
    """The average takes tasks with two metrics as one number; of several runs of a task the best counts; files are those of the leaderboard."""
    workdir(
        tmp_path / "runs/cola1",
        [{"step": 5, "cola/matthews": 0.9}, {"step": 9, "cola/matthews": 0.5}],
        {"cola_test-5": answers("1", "1"), "cola_test-9": answers("0", "1")},
    )
    workdir(tmp_path / "runs/cola2", [{"step": 9, "cola/matthews": 0.4}], {"cola_test-9": answers("1", "0")})
    mnli = {"mnli_test-7": answers("neutral", "entailment"), "mnli_mismatched_test-7": answers("contradiction"), "ax_test-7": answers("entailment")}
    workdir(tmp_path / "runs/mnli", [{"step": 7, "mnli/accuracy": 0.8, "mnli_mismatched/accuracy": 0.82, "train/loss": 1.0}], mnli)
    workdir(tmp_path / "runs/text", [{"step": 3, "mrpc/f1": 0.9, "mrpc/accuracy": 0.8}], {"mrpc_test-3": answers("equivalent", "what", "not_equivalent")})
    workdir(tmp_path / "runs/stsb", [{"step": 3, "stsb/pearson": 0.9, "stsb/spearman": 0.88}], {"stsb_test-3": answers(5.2, -0.25, 3.14159)})
    told = submit(tmp_path, "glue")
    assert told["tasks"] == {"cola": 50.0, "mrpc": 85.0, "stsb": 89.0, "mnli": 81.0} and told["average"] == (50 + 85 + 89 + 81) / 4
    out = tmp_path / "out"
    expected = {
        "CoLA.tsv": "index\tprediction\n0\t0\n1\t1\n",
        "MNLI-m.tsv": "index\tprediction\n0\tneutral\n1\tentailment\n",
        "MNLI-mm.tsv": "index\tprediction\n0\tcontradiction\n",
        "AX.tsv": "index\tprediction\n0\tentailment\n",
        "MRPC.tsv": "index\tprediction\n0\t1\n1\t0\n2\t0\n",
        "STS-B.tsv": "index\tprediction\n0\t5.000\n1\t0.000\n2\t3.142\n",
    }
    assert {path.name: path.read_text() for path in out.glob("*.tsv")} == expected
    assert set(told["files"]) == set(zipfile.ZipFile(out / "submission.zip").namelist()) == set(expected)
    printed = capsys.readouterr().out
    assert "average      76.25  of 4 tasks, without sst2, qqp, qnli, rte, wnli" in printed
    assert "cola         50.00  cola/matthews 50.00" in printed and "cola1, step 9" in printed
    assert "MRPC.tsv: 1 of 3 predictions are no label; 0 stands for them" in printed and "not answered: SST-2.tsv" in printed


def test_superglue_files(tmp_path):
    lines = {"file": "test.jsonl", "first": 1}
    named = {
        "boolq_test-1": answers("true", "false", **lines), "cb_test-1": answers("neutral", **lines), "copa_test-1": answers(1, 0, **lines),
        "multirc_test-1": answers("1", "0", "1", file="test.jsonl", ids=["0/0/0", "0/0/1", "0/1/2"]),
        "record_test-1": answers("Ana", "Lima", file="test.jsonl", ids=["0", "1"]), "rte_test-1": answers("entailment", **lines),
        "wic_test-1": answers("true", **lines), "wsc_test-1": answers("true", "false", file="test.jsonl", ids=["0", "1"]),
        "axb_test-1": answers("not_entailment", file="AX-b.jsonl", first=1), "axg_test-1": answers("entailment", file="AX-g.jsonl", first=1),
    }  # fmt: skip
    workdir(tmp_path / "runs/all", [{"step": 1, "record/f1": 60.0, "record/exact_match": 50.0, "cb/f1_macro": 0.5, "cb/accuracy": 0.7}], named)
    assert submit(tmp_path, "superglue")["tasks"] == {"cb": 60.0, "record": 55.0}
    expected = {
        "BoolQ.jsonl": '{"idx": 0, "label": "true"}\n{"idx": 1, "label": "false"}\n',
        "CB.jsonl": '{"idx": 0, "label": "neutral"}\n',
        "COPA.jsonl": '{"idx": 0, "label": 1}\n{"idx": 1, "label": 0}\n',
        "MultiRC.jsonl": '{"idx": 0, "passage": {"questions": [{"idx": 0, "answers": [{"idx": 0, "label": 1}, {"idx": 1, "label": 0}]}, '
        '{"idx": 1, "answers": [{"idx": 2, "label": 1}]}]}}\n',
        "ReCoRD.jsonl": '{"idx": 0, "label": "Ana"}\n{"idx": 1, "label": "Lima"}\n',
        "RTE.jsonl": '{"idx": 0, "label": "entailment"}\n',
        "WiC.jsonl": '{"idx": 0, "label": "true"}\n',
        "WSC.jsonl": '{"idx": 0, "label": "True"}\n{"idx": 1, "label": "False"}\n',
        "AX-b.jsonl": '{"idx": 0, "label": "not_entailment"}\n',
        "AX-g.jsonl": '{"idx": 0, "label": "entailment"}\n',
    }
    assert {path.name: path.read_text() for path in (tmp_path / "out").glob("*.jsonl")} == expected


def test_clue_files(tmp_path):
    named = {
        "tnews_test-1": answers("103", "104", file="test.json", first=1), "csl_test-1": answers("1", "0", file="test.json", ids=["6", "7"]),
        "cmrc2018_test-1": answers("山东", "一千五百多米", file="test.json", ids=["TEST_0_QUERY_0", "TEST_0_QUERY_1"]),
        "chid_test-1": answers(4, 9, file="test1.1.json", ids=["#idiom000005#", "#idiom000006#"]), "c3_test-1": answers(1, file="test1.1.json", ids=["0"]),
    }  # fmt: skip
    workdir(tmp_path / "runs/one", [{"step": 1, "cmrc2018/exact_match": 64.0, "cmrc2018/f1": 85.0, "tnews/accuracy": 0.56}], named)
    assert submit(tmp_path, "clue")["average"] == 60.0
    expected = {
        "tnews11_predict.json": '{"id": 0, "label": "103"}\n{"id": 1, "label": "104"}\n',
        "csl_predict.json": '{"id": 6, "label": "1"}\n{"id": 7, "label": "0"}\n',
        "cmrc2018_predict.json": '{\n "TEST_0_QUERY_0": "山东",\n "TEST_0_QUERY_1": "一千五百多米"\n}\n',
        "chid11_predict.json": '{\n "#idiom000005#": 4,\n "#idiom000006#": 9\n}\n',
        "c311_predict.json": '{"id": 0, "label": 1}\n',
    }
    assert {path.name: path.read_text() for path in (tmp_path / "out").glob("*.json")} == expected


def test_submissions_that_are_refused(tmp_path, capsys):
    assert "--benchmark" in refusal(submit, tmp_path, "glu") and "Did you mean 'glue'?" in refusal(submit, tmp_path, "glu")
    assert "names no workdir" in refusal(submit, tmp_path, "glue")
    run = workdir(tmp_path / "runs/a", [{"step": 1, "train/loss": 1.0}], {})
    assert "none of 1 runs has measured a task of glue" in refusal(submission.submit, benchmark="glue", runs=str(run), output=None)
    run = workdir(tmp_path / "runs/b", [{"step": 1, "sst2/accuracy": 0.5}], {})
    assert "no run has answered a test set" in refusal(submit, tmp_path, "glue")
    (run / "predictions/sst2_test-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers("0", "1", ids=[2, 4])))
    assert "SST-2.tsv: record 1 of the test set was not answered" in refusal(submit, tmp_path, "glue")
    (run / "predictions/sst2_test-1.jsonl").write_text('{"id": "test.tsv:2"}\n')
    assert "does not hold answers of sst2_test" in refusal(submit, tmp_path, "glue")
    (run / "metrics.jsonl").write_text("{")
    assert "metrics.jsonl, line 1" in refusal(submit, tmp_path, "glue")
    assert cli.main(["submission", "--benchmark=glue"]) == 2 and "--runs" in capsys.readouterr().err


# Runs.


def test_a_tiny_run_is_scored_and_handed_in(tmp_path, capsys):
    """From the recipe's words to the file of the leaderboard."""
    config = load(f"{FINETUNE}/glue.py:sst2,test,tiny")
    config.train.steps, config.log.writers = 4, ()
    assert runs.run(config, tmp_path / "runs/sst2") == 0
    capsys.readouterr()
    assert cli.main(["submission", "--benchmark=glue", f"--runs={tmp_path}/runs/*", f"--output={tmp_path}/out"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["files"] == ["SST-2.tsv"] and 0 <= told["average"] <= 100
    head, *rows = (tmp_path / "out/SST-2.tsv").read_text().splitlines()
    assert head == "index\tprediction" and [row.split("\t")[0] for row in rows] == ["0", "1"] and {row.split("\t")[1] for row in rows} <= {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", ["glue.py:stsb,tiny", "glue.py:all,tiny", "superglue.py:copa,test,tiny", "superglue.py:record,tiny", "clue.py:chid,tiny", *OTHERS]
)
def test_tiny_runs(spec, tmp_path):
    config = load(f"{FINETUNE}/{spec}")
    config.log.writers = ()
    assert runs.run(config, tmp_path / "run") == 0
    rows = [json.loads(line) for line in runs.metrics(tmp_path / "run").splitlines()]
    assert {key.partition("/")[0] for row in rows for key in row} >= {name for name in config.evals if not name.endswith("_test")}


def test_published_sets_in_other_layouts():
    """The three commands of glue.py's docstring for the sets of PTM_DATA."""
    if "PTM_DATA" not in os.environ:
        pytest.skip("PTM_DATA is not set: no SST-2, STS-B and RTE")
    root = f"{os.environ['PTM_DATA']}/classify"
    rte = ("text=sentence1", "pair=sentence2", "label=label", "1:text=1", "1:pair=2", "1:label=3")
    sets = {
        "sst2": (("sst2/alps_train.tsv", "sst2/alps_dev.tsv"), "sst2/alps_test.tsv", None, 67349, 872),
        "stsb": (("stsb/sts-train.csv",), "stsb/sts-dev.csv", ("text=5", "pair=6", "label=4"), 5749, 1500),
        "rte": (("rte/train.tsv", "rte/val.tsv"), "rte/dev.tsv", rte, 2490, 277),
    }
    for name, (train, dev, columns, training, development) in sets.items():
        config = resolved(f"glue.py:{name},tiny")
        data = dataclasses.replace(
            config.data, source=tuple(f"tsv:{root}/{file}" for file in train), validation_source=(f"tsv:{root}/{dev}",), columns=columns or config.data.columns
        )  # fmt: skip
        for split, count in (("train", training), ("validation", development)):
            corpus = Corpus(data, split=split)
            read = [corpus.record(source, n) for source, size in enumerate(corpus.sizes) for n in range(size)]
            assert len(read) == count and None not in read
            known = {row[1]["label"] for row in read}
            assert known <= set(config.objective.labels) if name != "stsb" else all(0 <= float(label) <= 5 for label in known)
