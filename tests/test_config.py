"""Config: what a user writes is read as declared, or refused with what was given, what is allowed and what to do."""

import ast
import dataclasses
import functools
import json
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from ptm import config, fields, parallel, registry
from ptm.config import Data, Train
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import bert, gpt, t5
from ptm.objectives import causal, mlm, span_corruption
from ptm.recipe import load

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs/quickstart.py"
CLASSES = config.SECTIONS | {f"{kind}.{name}": cls for kind, table in registry.REGISTRIES.items() for name, cls in table.items()}


def recipe(argument: str = "", **overrides: str) -> ConfigDict:
    """The quickstart's config with overrides as the command line gives them; `__` stands for a dot."""
    cfg = load(f"{QUICKSTART}:{argument}")
    for key, text in overrides.items():
        config.override(cfg, key.replace("__", "."), text, registry.REGISTRIES)
    return cfg


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        function(*args, **kwargs)
    return str(error.value)


# What is refused. Each row: words of the recipe, overrides, parts of the message.
REFUSED = {
    "typo in a key": ("", {"train__stps": "3"}, ["--config.train.stps", "Did you mean 'train.steps'?", "--print_config"]),
    "typo in a section": ("", {"optimzer__learning_rate": "1"}, ["--config.optimzer.learning_rate", "'optimizer.learning_rate'"]),
    "key of another section": ("", {"train__learning_rate": "1"}, ["'optimizer.learning_rate'"]),
    "key without its section": ("", {"batch_size": "1"}, ["--config.batch_size", "'train.batch_size'"]),
    "far from every key of its section": ("", {"optimizer__lr": "1"}, ["Keys of optimizer: name, learning_rate, weight_decay"]),
    "key of another family": ("bert", {"model__scale_by_layer": "true"}, ["--config.model.scale_by_layer"]),
    "typo in the name of an eval": ("", {"evals__valid__every": "1"}, ["'evals.validation.every'"]),
    "section as a key": ("", {"train": "3"}, ["--config.train is a section", "train.steps, train.batch_size"]),
    "name of the family": ("", {"model__name": "bert"}, ["--config.model.name cannot be overridden", "recipe's argument"]),
    "float for an int": ("", {"train__steps": "3.5"}, ["--config.train.steps=3.5", "allowed: int"]),
    "word for a float": ("", {"optimizer__learning_rate": "fast"}, ["--config.optimizer.learning_rate=fast", "allowed: float"]),
    "word for a bool": ("", {"log__norms": "maybe"}, ["--config.log.norms=maybe", "allowed: true or false"]),
    "nothing for an int": ("", {"train__steps": ""}, ["--config.train.steps=", "allowed: int"]),
    "None for an int": ("", {"train__steps": "None"}, ["--config.train.steps=None", "allowed: int"]),
    "word for a nullable int": ("", {"data__streams": "many"}, ["--config.data.streams=many", "allowed: int or None"]),
    "float in a tuple of int": ("", {"log__profile": "1,3.5"}, ["--config.log.profile[1]=3.5", "allowed: int"]),
    "below the range": ("", {"train__steps": "0"}, ["train.steps=0", "allowed: 1 or more steps", "Optimizer steps of the whole run"]),
    "above the range": ("", {"data__holdout": "0.6"}, ["data.holdout=0.6", "allowed: 0.0 to 0.5"]),
    "item of a tuple below the range": ("", {"data__weights": "-1"}, ["data.weights=-1.0", "allowed: 0.0 or more"]),
    "top-level key below the range": ("", {"seed": "-1"}, ["seed=-1", "allowed: 0 to 2147483647"]),
    "key of an eval below the range": ("", {"evals__validation__every": "0"}, ["evals.validation.every=0", "allowed: 1 or more steps"]),
    "not a number": ("", {"optimizer__learning_rate": "nan"}, ["optimizer.learning_rate=nan", "allowed: finite numbers", "Peak learning rate"]),
    "infinite": ("", {"optimizer__clip_norm": "inf"}, ["optimizer.clip_norm=inf", "allowed: finite numbers"]),
    "none of the choices": ("", {"data__packing": "firstfit"}, ["data.packing=firstfit", "concat, first_fit, window", "Did you mean 'first_fit'?"]),
    "activation": ("", {"model__activation": "relo"}, ["model.activation=relo", "gelu_tanh", "Did you mean 'relu'?"]),
    "tokenizer": ("", {"tokenizer__kind": "sentencepeace"}, ["tokenizer.kind", "bpe, bytes, chars, file", "Did you mean 'sentencepiece'?"]),
    "optimizer": ("", {"optimizer__name": "adam"}, ["optimizer.name", "'adam'", "adafactor, adamw", "Did you mean 'adamw'?"]),
    "schedule": ("", {"schedule__name": "cosin"}, ["schedule.name", "constant, cosine", "Did you mean 'cosine'?"]),
    "sharding preset": ("", {"mesh__preset": "fspd"}, ["mesh.preset", "dp, fsdp", "Did you mean 'fsdp'?"]),
    "log writer": ("", {"log__writers": "tensorboard,wandv"}, ["log.writers", "tensorboard, trackio, wandb", "Did you mean 'wandb'?"]),
    "source without a format": ("", {"data__source": "corpus.txt"}, ["data.source=corpus.txt", "FORMAT:PATH", "text:corpus/*.txt"]),
    "validation source without a format": ("", {"data__validation_source": "v.txt"}, ["data.validation_source=v.txt", "FORMAT:PATH"]),
    "no source": ("", {"data__source": ""}, ["data.source is empty", "text:corpus/*.txt"]),
    "weights of other sources": ("", {"data__weights": "1,2"}, ["data.weights=1.0,2.0", "one weight for each"]),
    "weights that are all zero": ("", {"data__weights": "0"}, ["data.weights=0.0", "not all 0"]),
    "column map": ("", {"data__columns": "text"}, ["data.columns=text", "FIELD=COLUMN"]),
    "two free mesh axes": ("", {"mesh__fsdp": "-1"}, ["mesh.data=-1", "mesh.fsdp=-1", "at most once"]),
    "empty mesh axis": ("", {"mesh__tensor": "0"}, ["mesh.tensor=0", "positive numbers"]),
    "heads that do not divide the width": ("", {"model__num_heads": "5"}, ["model.num_heads=5", "model.width=192", "1, 2, 3, 4, 6"]),
    "heads of an encoder": ("bert,tiny", {"model__num_heads": "3"}, ["model.num_heads=3", "model.width=32"]),
    "rows longer than the positions": ("", {"data__length": "129"}, ["data.length=129", "model.max_length=128", "--config.model.max_length=129"]),
    "nothing is masked": ("bert", {"objective__rate": "0"}, ["objective.rate=0.0", "nothing to predict", "between 0 and 1"]),
    "all is masked": ("bert", {"objective__rate": "1"}, ["objective.rate=1.0", "nothing to predict from", "between 0 and 1"]),
    "more than all is masked": ("bert", {"objective__rate": "1.5"}, ["objective.rate=1.5", "allowed: 0.0 to 1.0"]),
    "all is corrupted": ("t5", {"objective__rate": "1"}, ["objective.rate=1.0", "nothing to predict from"]),
    "shares of more than all": ("bert", {"objective__random_share": "0.3"}, ["objective.mask_share=0.8", "objective.random_share=0.3", "exceed 1"]),
    "lengths that no text fits": ("t5", {"objective__input_length": "4", "data__length": "2"}, ["objective.input_length=4", "data.length=2", "longer"]),
    "microbatches": ("", {"train__microbatches": "3"}, ["train.microbatches=3", "train.batch_size=16", "allowed: 1, 2, 4, 8, 16"]),
    "streams": ("", {"data__streams": "5"}, ["data.streams=5", "train.batch_size=16", "allowed: 1, 2, 4, 8, 16"]),
    "warm-up of the whole run": ("", {"train__steps": "800", "schedule__warmup_steps": "800"}, ["schedule.warmup_steps=800", "train.steps=800", "0 to 799", "Lower --config"]),
    "metric of no eval": ("", {"checkpoint__metric": "valid/loss"}, ["checkpoint.metric=valid/loss", "EVAL/METRIC", "'validation'?", "keep_best=0"]),
    "profile that ends before it begins": ("", {"log__profile": "5,4"}, ["log.profile=5,4", "FIRST <= LAST"]),
    "profile of one step": ("", {"log__profile": "5"}, ["log.profile=5;", "two steps"]),
    "profile after the run": ("", {"train__steps": "800", "log__profile": "800,801"}, ["log.profile=800,801", "allowed: steps from 0 to 799"]),
    "start of the parameters": ("", {"init": "scrach"}, ["init=scrach", "ckpt:DIR", "Did you mean 'scratch'?"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """Each mistake gives one line with the key, its value, what is allowed and what to do."""
    words, overrides, parts = REFUSED[name]
    message = refusal(lambda: registry.resolve(recipe(words, **overrides)))
    for part in parts:
        assert part in message, message
    assert "\n" not in message and "Traceback" not in message


def test_accepted():
    """What is next to the refused values is accepted, so that the checks are no blanket."""
    accepted = recipe(
        "bert", train__steps="91", schedule__warmup_steps="90", train__microbatches="16", data__length="128", model__num_heads="1", log__profile="0,90",
        objective__rate="0.999", objective__mask_share="0.9", data__streams="8", mesh__data="1", mesh__fsdp="-1", init="ckpt:runs/other@best",
    )  # fmt: skip
    resolved = registry.resolve(accepted)
    assert resolved.train == Train(steps=91, batch_size=16, microbatches=16)
    assert resolved.log.profile == (0, 90) and resolved.data.streams == 8 and resolved.mesh.fsdp == -1
    no_best = recipe(checkpoint__metric="other/loss", checkpoint__keep_best="0")
    assert registry.resolve(no_best).checkpoint.metric == "other/loss"


@pytest.mark.parametrize(
    ("model", "objective", "fitting"),
    [
        (gpt.Config(), mlm.Config(), {"causal", "prefix", "denoising", "ul2"}),
        (gpt.Config(), span_corruption.Config(input_length=16), {"causal"}),
        (bert.BertConfig(), span_corruption.Config(input_length=16), {"causal", "mlm", "prefix"}),
        (t5.Config(), causal.Config(), {"span_corruption", "denoising", "prefix", "mixture"}),
    ],
)
def test_objective_must_fit_the_family(model, objective, fitting):
    message = refusal(registry.resolve, config.base(model=model, objective=objective))
    assert f"objective {objective.name}" in message and f"model {model.name} is of kind {model.kind}" in message
    listed = set(re.search(r"Objectives that fit it: ([^;]*);", message).group(1).split(", "))
    assert fitting <= listed and objective.name not in listed


# Reading.


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("3", int, 3),
        ("-1", int, -1),
        ("1", float, 1.0),
        ("1e-3", float, 1e-3),
        ("True", bool, True),
        ("no", bool, False),
        ("None", str | None, None),
        ("null", int | None, None),
        ("4", int | None, 4),
        ("None", str, "None"),
        ("", tuple[str, ...], ()),
        ("a", tuple[str, ...], ("a",)),
        ("1, 2", tuple[int, ...], (1, 2)),
        ("(1,)", tuple[int, ...], (1,)),
        ("['a', \"b\"]", tuple[str, ...], ("a", "b")),
        ("[0.5,1]", tuple[float, ...], (0.5, 1.0)),
        ("parallel:a.{en,de},text={b}", tuple[str, ...], ("parallel:a.{en,de}", "text={b}")),
        ("'{a','b}'", tuple[str, ...], ("{a", "b}")),
    ],
)
def test_parse(text, annotation, value):
    parsed = fields.parse(text, annotation, "key")
    assert parsed == value and type(parsed) is type(value)
    assert fields.parse(fields.unparse(parsed), annotation, "key") == value


def test_none_is_null_only_where_declared():
    cfg = recipe(optimizer__clip_norm="None", model__vocab_size="None", train__ema_decay="0.99")
    resolved = registry.resolve(cfg)
    assert resolved.optimizer.clip_norm is None and resolved.model.vocab_size is None and resolved.train.ema_decay == 0.99
    config.override(cfg, "train.ema_decay", "None", registry.REGISTRIES)
    assert registry.resolve(cfg).train.ema_decay is None


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("train.steps", 3.5, ["train.steps=3.5", "float", "allowed: int"]),
        ("train.steps", True, ["train.steps=True", "bool", "allowed: int"]),
        ("train.steps", None, ["train.steps=None", "allowed: int"]),
        ("log.norms", 1, ["log.norms=1", "int", "allowed: true or false"]),
        ("log.profile", [1, 3.5], ["log.profile[1]=3.5", "float", "allowed: int"]),
        ("data.source", "text:a.txt", ["data.source='text:a.txt'", "str", "allowed: tuple of str"]),
        ("train.ema_decay", "0.9", ["train.ema_decay='0.9'", "str", "allowed: float or None"]),
        ("model.width", "wide", ["model.width='wide'", "allowed: int"]),
        ("train.stps", 3, ["train.stps", "Did you mean 'steps'?", "batch_size"]),
        ("trian", {}, ["trian", "Did you mean 'train'?", "optimizer"]),
        ("model.name", "gtp", ["model.name", "'gtp'", "gpt, ", "Did you mean 'gpt'?"]),
        ("evals.validation.name", "los", ["evals.validation.name", "Did you mean 'loss'?"]),
    ],
)
def test_json_of_a_config_is_checked(key, value, parts):
    """A config.json that was edited, or a config made in Python, passes the same checks."""
    tree = config.to_dict(registry.resolve(recipe()))
    node, (*path, leaf) = tree, key.split(".")
    for part in path:
        node = node[part]
    node[leaf] = value
    message = refusal(registry.resolve, tree)
    assert all(part in message for part in parts), message


def test_json_of_a_config_must_be_whole():
    for section, key in (("train", None), ("model", None), ("model", "name")):
        tree = config.to_dict(registry.resolve(recipe()))
        if key:
            del tree[section][key]
        else:
            del tree[section]
        assert section in refusal(registry.resolve, tree)


def test_a_config_made_in_python_is_checked():
    resolved = registry.resolve(recipe())
    bad = dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, steps=0))
    assert "train.steps=0" in refusal(registry.resolve, bad)
    assert registry.resolve(resolved) == resolved


def test_base_refuses_what_is_no_section():
    parts = {"model": gpt.Config(), "objective": causal.Config()}
    assert "Did you mean 'train'?" in refusal(config.base, **parts, trian=Train())
    assert "got a Data; allowed: ptm.config.Train" in refusal(config.base, **parts, train=Data())


def test_base_takes_sections_and_top_level_keys():
    cfg = config.base(model=gpt.Config(width=24), objective=causal.Config(), evals={"v": loss.Config(every=3)}, train=Train(steps=7), seed=5)
    resolved = config.resolve(cfg, registry.REGISTRIES)
    assert (resolved.seed, resolved.train.steps, resolved.model.width, resolved.evals["v"].every) == (5, 7, 24, 3)
    assert resolved.data == Data() and resolved.init == "scratch"


def test_streams():
    assert registry.streams(registry.resolve(recipe(train__batch_size="48"))) == 16
    assert registry.streams(registry.resolve(recipe(train__batch_size="48", data__streams="3"))) == 3


# Recipes.


def words_of(path: Path) -> tuple[list[str], list[str], list[str]]:
    """(recipes, objectives, scales) of a recipe file, from what it says to an unknown word."""
    message = refusal(load, f"{path}:?")
    found = (re.search(rf"{kind}: ([^.]*)\.", message) for kind in ("Recipes", "Objectives", "Scales"))
    return tuple(match.group(1).split(", ") if match else [] for match in found)


def specs_of(path: Path) -> list[str]:
    """Every recipe with each of its objectives, in each scale."""
    names, objectives, scales = words_of(path)
    specs = []
    for name in ("", *names):
        fitting = [""]
        for objective in objectives:
            try:
                load(f"{path}:{name},{objective}")
                fitting.append(objective)
            except ConfigError as error:
                assert "has no recipe for" in str(error)
        specs += [f"{path.relative_to(ROOT)}:{','.join(filter(None, (name, objective, scale)))}" for objective in fitting for scale in ("", *scales)]
    return specs


RECIPES = [spec for path in sorted((ROOT / "configs").rglob("*.py")) for spec in specs_of(path)]


@pytest.mark.parametrize("spec", RECIPES)
def test_recipe_resolves(spec, monkeypatch):
    """Every word and scale; and what was resolved survives the way to JSON and to the command line and back."""
    monkeypatch.setenv("PTM_DATA", "/nowhere")
    monkeypatch.chdir(ROOT)
    cfg = load(spec)
    of_init = cfg.model.name == config.ModelOfInit.name  # the checks of a whole config need its model
    resolve = functools.partial(config.resolve, registries=registry.REGISTRIES) if of_init else registry.resolve
    resolved = resolve(cfg)
    tree = json.loads(json.dumps(config.to_dict(resolved)))
    assert resolve(tree) == resolved
    assert config.fingerprint(tree) == config.fingerprint(resolved)
    assert not config.diff(tree, resolved)
    for key, (annotation, _) in config.schema(cfg, registry.REGISTRIES).items():
        value = config.flatten(resolved)[key]
        config.override(cfg, key, fields.unparse(value), registry.REGISTRIES)
        assert fields.coerce(value, annotation, key) == fields.parse(fields.unparse(value), annotation, key)
    assert resolve(cfg) == resolved


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.py")), ids=lambda path: path.name)
def test_recipe_describes_itself(path):
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"ptm train --config={path.relative_to(ROOT)}" in docstring, "a recipe's docstring holds its command"
    assert "tiny" in words_of(path)[2], "every recipe has a smoke run"


def test_recipe_needs_its_data(monkeypatch):
    monkeypatch.delenv("PTM_DATA", raising=False)
    message = refusal(load, f"{ROOT}/configs/gpt2.py")
    assert "configs/gpt2.py" in message and "set PTM_DATA" in message and "input.txt" in message


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("brt", ["'brt'", "gpt, gpt1, llama, bert", "causal, prefix", "tiny", "Did you mean 'bert'?"]),
        ("albert,causal", ["albert has no recipe for causal", "sop, mlm, nsp"]),
        ("bert,t5", ["two recipes, 'bert' and 't5'"]),
        ("tiny,tiny", ["two scales, 'tiny' and 'tiny'"]),
    ],
)
def test_words_of_a_recipe(argument, parts):
    message = refusal(recipe, argument)
    assert all(part in message for part in parts), message


def test_order_of_words_does_not_matter():
    assert registry.resolve(recipe("bert,tiny")) == registry.resolve(recipe("tiny,bert"))
    assert registry.resolve(recipe("tiny")).model.name == "gpt"


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("cfg.train.stps = 3", ["line 6", "stps", 'Did you mean "steps"']),
        ("cfg.trian.steps = 3", ["line 6", "trian", 'Did you mean "train"']),
        ("cfg.train.steps = 'many'", ["line 6", "steps", "many"]),
        ("config.Train(stps=3)", ["line 6", "stps"]),
        ("return None", ["NoneType", "ptm.config.base()"]),
    ],
)
def test_mistake_in_a_recipe(line, parts, tmp_path):
    """Told with the recipe's line instead of a traceback, and without the values of the whole section."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from ptm import config\nfrom ptm.models import gpt\nfrom ptm.objectives import causal\n"
        f"def get_config(argument):\n    cfg = config.base(model=gpt.Config(), objective=causal.Config())\n    {line}\n    return cfg\n"
    )
    message = refusal(load, str(path))
    assert all(part in message for part in (str(path), *parts)) and len(message) < 300, message


def test_recipe_that_is_none(tmp_path):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "mine.txt").write_text("")
    assert "no function get_config" in refusal(load, f"{tmp_path}/mine.py")
    assert "must end in .py" in refusal(load, f"{tmp_path}/mine.txt")
    for missing in (f"{tmp_path}/mime.py", f"{tmp_path}"):
        assert "mine.py" in refusal(load, missing)
    assert "Did you mean 'mine.py'?" in refusal(load, f"{tmp_path}/mime.py")


# Differences and fingerprints.


def test_diff_and_fingerprint():
    one, two = registry.resolve(recipe("tiny")), registry.resolve(recipe("tiny", train__steps="21", optimizer__clip_norm="None"))
    assert config.diff(one, two) == {"train.steps": (20, 21), "optimizer.clip_norm": (1.0, None)}
    assert config.diff(one, one) == {}
    assert config.fingerprint(one) != config.fingerprint(two)
    reordered = dict(reversed(config.to_dict(one).items()))
    assert config.fingerprint(reordered) == config.fingerprint(one) and re.fullmatch("[0-9a-f]{16}", config.fingerprint(one))
    assert config.fingerprint(one.train) != config.fingerprint(two.train) and config.fingerprint(one.data) == config.fingerprint(two.data)


def test_difference_between_families_names_both():
    changes = config.diff(registry.resolve(recipe("gpt")), registry.resolve(recipe("bert")))
    assert changes["model.name"] == ("gpt", "bert") and changes["model.use_bias"] == (True, None) and changes["model.num_types"] == (None, 2)


def test_difference_from_base_lists_what_the_recipe_sets():
    resolved = registry.resolve(config.base(model=gpt.Config(width=24), objective=causal.Config(), evals={"validation": loss.Config()}, train=Train(steps=7)))
    assert config.diff(config.defaults_of(resolved), resolved) == {"model.width": (768, 24), "train.steps": (1000, 7)}


# Declarations.


@pytest.mark.parametrize("name", CLASSES)
def test_declaration(name):
    """Every key has a meaning, a type that the command line can give, and a default that its own check accepts."""
    cls = CLASSES[name]
    fields.check(cls(), name)
    for item in dataclasses.fields(cls):
        meta, annotation = item.metadata, fields.annotations(cls)[item.name]
        assert meta["doc"].endswith("."), f"{name}.{item.name}"
        if item.name in fields.tables(cls):
            continue  # holds sections, which recipes choose
        assert fields.parse(fields.unparse(item.default), annotation, item.name) == item.default, f"{name}.{item.name}"
        assert not item.name.startswith("_") and cls.__dataclass_params__.frozen
    for kind in ("model", "objective"):
        if name.startswith(kind + "."):
            assert cls.name == name.removeprefix(kind + ".")


@functools.cache
def _modules() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted((ROOT / "ptm").rglob("*.py"))}


def test_no_hidden_defaults():
    """`config.get(key, default)` and `getattr(config, key, default)` would be a second place where a default is declared."""
    configs = {"config", "cfg", "options", "resolved", *config.SECTIONS, "model_config"}
    found = []
    for path, module in _modules().items():
        for node in ast.walk(module):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                owner = node.func.value
            elif isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
                owner = node.args[0]
            else:
                continue
            names = {n.id for n in ast.walk(owner) if isinstance(n, ast.Name)} | {n.attr for n in ast.walk(owner) if isinstance(n, ast.Attribute)}
            if names & configs:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found


@functools.cache
def _reads() -> set[tuple[str, str, str]]:
    """(file, name of the owner, attribute) of all attributes that the package reads, but for those of the checks of configs."""
    reads = set()
    for path, module in _modules().items():
        methods = [method for item in ast.walk(module) if isinstance(item, ast.ClassDef) for method in item.body if isinstance(method, ast.FunctionDef)]
        checks = {id(node) for method in methods if method.name == "check" for node in ast.walk(method)}
        for node in ast.walk(module):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in checks:
                owner = ast.unparse(node.value).rpartition(".")[2].lstrip("_")
                reads.add((str(path.relative_to(ROOT)), owner, node.attr))
    return reads | {("ptm/parallel.py", "mesh", axis) for axis in parallel.MESH_AXES}  # read by name


@pytest.mark.parametrize("name", CLASSES)
def test_every_key_is_read(name):
    """A key that nothing reads is a lie. Owners are the names under which the package passes configs of a section around."""
    cls, reads = CLASSES[name], _reads()
    homes = {base.__module__.replace(".", "/") + ".py" for base in cls.__mro__}
    owners = {"c", "config", "options"} if "." in name else {"c", "options", name}
    read = {key for file, owner, key in reads if owner in owners or owner == "self" and file in homes}
    assert not set(fields.annotations(cls)) - read
