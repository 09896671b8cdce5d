"""The direction of imports (docs/design.md, section 2), read off the source: only downward, each library only where it belongs."""

import ast
import configparser
import functools
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# From the lowest to the highest. A module imports only from rows above its own, a package also from itself. Modules of one row do not
# import each other. A new file of ptm/ needs a place here.
RANKS = """
fields allocator statistics page atomic untrusted
tree sections processes lock saved
config
recipe
parallel text log metrics lora hosts compiles
nn data optim interrupts watchdog timing
models
generate checkpoint hf
objectives
state evals analysis
registry specs growth labels recompute mup
run
samples weights adopt
teacher
describe
train evaluate convert predict analyze harness submission plan
seeds study
report
prepare
flags
cli
"""

# Library -> where it may be imported. `ptm/nn/` is a folder and all below it.
ONLY_IN = {
    "ml_collections": ("ptm/config.py",),
    "flax.linen": ("ptm/nn/", "ptm/models/"),
    "grain": ("ptm/data/formats/stores.py", "ptm/data/mixture.py"),
    "tensorflow_datasets": ("ptm/data/formats/stores.py", "ptm/prepare/dataset.py", "ptm/prepare/beam.py", "ptm/prepare/builder.py"),
    "apache_beam": ("ptm/prepare/beam.py", "ptm/prepare/builder.py"),
    "pyarrow": ("ptm/data/formats/stores.py",),
    "array_record": ("ptm/data/formats/stores.py", "ptm/prepare/dataset.py"),
    "datasketch": ("ptm/prepare/sketch.py",),
    "fsspec": ("ptm/prepare/reading.py",),
    "orbax": ("ptm/checkpoint.py",),
    "optax": ("ptm/optim.py", "ptm/state.py", "ptm/analysis/probes.py"),
    "matplotlib": ("ptm/analysis/pictures.py",),
    "scipy": ("ptm/analysis/attention.py", "ptm/statistics.py"),
    "sentencepiece": ("ptm/text/",),
    "tokenizers": ("ptm/text/",),
    "safetensors": ("ptm/hf/files.py",),
    "torch": ("ptm/hf/check.py",),
    "transformers": ("ptm/hf/check.py",),
    "sacrebleu": ("ptm/metrics/written.py",),
    "rouge_score": ("ptm/metrics/written.py",),
    "huggingface_hub": ("ptm/specs.py",),
    "lm_eval": ("ptm/harness.py",),
    "optuna": ("ptm/study/search.py",),
}
NEVER = {"tensorflow", "pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Folders that must not know a library or a part of the package, directly.
BARRED = {
    "ptm/text/": {"jax", "flax", "optax", "ptm.config"},
    "ptm/data/": {"jax", "flax", "optax", "ptm.text"},
    "ptm/metrics/": {"jax", "flax", "optax"},
    "ptm/nn/": {"ptm.config", "ptm.data", "ptm.text"},
    "ptm/models/": {"ptm.config", "ptm.data", "ptm.text"},
    "ptm/fields.py": {"jax", "flax", "numpy"},
    "ptm/sections.py": {"jax", "flax", "numpy"},
    "ptm/config.py": {"jax", "flax", "numpy"},
}
# What an entry point of its own cannot do without, and who does not call it need not have.
EXTRA = {"ptm/harness.py": ("lm_eval", "tqdm"), "ptm/prepare/beam.py": ("apache_beam",), "ptm/prepare/builder.py": ("apache_beam",)}
# Imports inside functions, each for a reason that its file gives: a usage error must not wait for JAX, nor `import ptm`; one format is slow to load.
LATE = {
    "ptm/flags.py": {"ptm.config"},
    "ptm/cli.py": {"ptm.config", "ptm.recipe", "ptm.registry", "ptm.run", "ptm.samples", "ptm.train", "ptm.seeds", "ptm.evaluate", "ptm.convert", "ptm.adopt", "ptm.analyze", "ptm.submission", "ptm.predict.tasks", "ptm.plan.command", "ptm.prepare.command", "ptm.study.runner", "ptm.report.command", "ptm.hosts"},
    "ptm/analysis/pictures.py": {"matplotlib.backends.backend_agg", "matplotlib.figure"},
    "ptm/__init__.py": {"ptm.weights"},
    "ptm/nn/attention.py": {"ptm.nn.pallas"},
    "ptm/study/__init__.py": {"ptm.study.resolution"},
    "ptm/study/search.py": {"optuna"},
    "ptm/specs.py": {"huggingface_hub"},
    "ptm/hf/check.py": {"torch", "transformers"},
    "ptm/metrics/written.py": {"sacrebleu", "rouge_score.rouge_scorer"},
    "ptm/data/formats/stores.py": {"tensorflow_datasets", "pyarrow.parquet"},
    "ptm/prepare/command.py": {"ptm.prepare.builder"},
    "ptm/prepare/dataset.py": {"tensorflow_datasets", "tensorflow_datasets.core.example_serializer"},
    "ptm/prepare/reading.py": {"fsspec"},
    "ptm/prepare/sketch.py": {"datasketch.MinHash"},
}


class Import(NamedTuple):
    """An import statement: the file with it, its line, the full name of a module, and whether it stands inside a function."""

    file: str
    line: int
    module: str
    late: bool


def _resolve(name: str) -> str:
    """A dotted name cut down to the module of this package that holds it; other names stay as they are."""
    path = ROOT / name.replace(".", "/")
    if not name.startswith("ptm.") or path.is_dir() or path.with_suffix(".py").is_file():
        return name
    return _resolve(name.rpartition(".")[0])


def _imports(source: str, file: str) -> list[Import]:
    module = ast.parse(source)
    inside = {id(node) for function in ast.walk(module) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)}
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [Import(file, node.lineno, _resolve(name), id(node) in inside) for name in names]
    return found


def _files(*folders: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def imports(*folders: str) -> list[Import]:
    return [found for file in _files(*folders) for found in _imports((ROOT / file).read_text(), file)]


RANK = {name: number for number, row in enumerate(RANKS.split("\n")) for name in row.split()}


def part(module: str) -> str:
    """The row entry of a module: 'nn' of ptm.nn.attention and of ptm/nn/attention.py."""
    return module.removesuffix(".py").replace("/", ".").split(".")[1]


def upward(found: list[Import]) -> list[str]:
    """Imports within the package that do not lead down."""
    inner = [item for item in found if item.module.startswith("ptm.") and item.file != "ptm/__init__.py"]
    wrong = [item for item in inner if part(item.module) != part(item.file) and RANK[part(item.module)] >= RANK[part(item.file)]]
    return [f"{item.file}:{item.line} imports {item.module}" for item in wrong]


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix if prefix.endswith("/") else prefix + ".")


def test_every_module_has_a_rank():
    parts = {part(file) for file in _files("ptm") if file != "ptm/__init__.py"}
    assert parts == set(RANK), "ptm/ and RANKS name the same modules"


def test_imports_lead_down():
    assert not upward(imports("ptm"))


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("from ptm import config", "ptm/tree.py"),
        ("import ptm.objectives.mlm", "ptm/models/gpt.py"),
        ("from ptm.data.batch import Field", "ptm/optim.py"),
        ("def f():\n    from ptm.train import train", "ptm/run.py"),
    ],
)
def test_a_wrong_import_is_found(line, file):
    assert len(upward(_imports(line, file))) == 1


def test_no_cycles_inside_a_package():
    """Modules of one package import each other without going round."""
    edges: dict[str, set[str]] = {}
    for item in imports("ptm"):
        name = item.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if item.module.startswith("ptm") and not item.late and item.module != name:
            edges.setdefault(name, set()).add(item.module)
    done: set[str] = set()
    while ready := [name for name in {*edges, *(m for targets in edges.values() for m in targets)} - done if edges.setdefault(name, set()) <= done]:
        done |= set(ready)
    assert not set(edges) - done


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_stays_where_it_belongs(library):
    users = {item.file for item in imports("ptm") if _within(item.module, library)}
    allowed = ONLY_IN[library]
    assert not [file for file in users if not any(_within(file, place) for place in allowed)]


@pytest.mark.parametrize("place", BARRED)
def test_barred(place):
    wrong = [item for item in imports("ptm") if _within(item.file, place) for module in BARRED[place] if _within(item.module, module)]
    assert not wrong


def test_objectives_know_only_the_contract_of_the_data():
    assert {item.module for item in imports("ptm/objectives") if _within(item.module, "ptm.data")} == {"ptm.data.batch"}


def test_never():
    assert not [item for item in imports("ptm", "configs") if item.module.split(".")[0] in NEVER]


def test_late_imports_are_documented():
    late: dict[str, set[str]] = {}
    for item in imports("ptm"):
        if item.late:
            late.setdefault(item.file, set()).add(item.module)
    assert late == LATE


def test_the_package_imports_nothing_of_the_checkout():
    outside = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name.isidentifier()} - {"ptm"}
    assert {"configs", "tests"} <= outside
    assert not [item for item in imports("ptm") if item.module.split(".")[0] in outside]


def test_recipes_import_config_classes_alone():
    """A recipe knows ptm.config and the modules of the Config classes that it uses; of these it takes the classes and published SIZES."""
    for file in _files("configs"):
        module = ast.parse((ROOT / file).read_text())
        found = _imports((ROOT / file).read_text(), file)
        inner = [item.module for item in found if item.module.startswith("ptm")]
        assert all(part(name) in ("config", "recipe", "fields", "models", "objectives", "evals") for name in inner), file
        assert all(item.module.split(".")[0] in {"ptm", *sys.stdlib_module_names} for item in found), file
        tables = {name.rpartition(".")[2] for name in inner if part(name) in ("models", "objectives", "evals")}
        used = {node.attr for node in ast.walk(module) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in tables}
        assert all(name.endswith(("Config", "SIZES")) for name in used), (file, used)


def test_libraries_are_declared():
    """Everything that the package imports at its top comes from the standard library or from a requirement in setup.cfg."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {line.split()[0].lower().replace("_", "-") for line in setup["options"]["install_requires"].strip().splitlines()}
    sources = metadata.packages_distributions()
    for item in imports("ptm"):
        top = item.module.split(".")[0]
        # Late ones may be extras.
        if top != "ptm" and top not in sys.stdlib_module_names and not item.late and top not in EXTRA.get(item.file, ()):
            names = {name.lower().replace("_", "-") for name in sources[top]}
            assert names & required, f"{item.file}:{item.line} imports {top}, of {sorted(names)}, which setup.cfg does not require"


@pytest.mark.parametrize(("module", "absent"), [("ptm", "ptm.config numpy jax"), ("ptm.text", "jax"), ("ptm.cli", "numpy jax"), ("ptm.config", "numpy jax")])
def test_light_imports(module, absent):
    """What importing a module loads in a fresh interpreter, its own imports included."""
    code = f"import sys, {module}; print(*[name for name in {absent.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.split() == []


def test_launchers_know_little_of_the_package():
    """They hand commands to processes, resolve studies, and keep records."""
    inner = [item for item in imports("launch") if item.module.startswith("ptm")]
    assert {part(item.module) for item in inner} == {"atomic", "fields", "processes", "study", "untrusted"}
    assert {item.module.split(".")[0] for item in imports("launch")} <= {"ptm", "launch", "yaml", *sys.stdlib_module_names}
