"""What the source may not do (docs/security.md), read off its syntax: no pickle, no code from data, no names that become imports, no shell; and names that stay in place."""

import ast
import configparser
import re
from importlib import metadata
from pathlib import Path

import pytest

from ptm import config as config_lib
from ptm import registry, untrusted
from ptm.evals import loss
from ptm.fields import ConfigError
from ptm.models import gpt
from ptm.objectives import causal

ROOT = Path(__file__).parent.parent
FOLDERS = ("ptm", "launch", "configs", "experiments")
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile"}  # the last: its members would need checks of their own
CALLS = {
    "eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "shutil.unpack_archive", "torch.load", "pandas.read_pickle",
}  # fmt: skip
YAML = {"safe_load", "safe_load_all", "safe_dump", "safe_dump_all"}
# Where a module is loaded by a name that is not written in an import: file::function, and why the name is none of data.
LOADERS = {
    "ptm/recipe.py::call": "recipes and studies are Python by design: the file is what the user names on the command line",
    "ptm/log.py::_import": "trackers; their names stand in the calls",
}
# Where JSON is parsed without the checks of ptm/untrusted.py, and why.
JSON = {
    "ptm/untrusted.py": "the checks",
    "ptm/hf/files.py": "a header, whose size and depth were checked, to find names that are given twice",
    "ptm/text/base.py": "a vocabulary file that was checked when it was opened",
    "ptm/text/library.py": "what the tokenizers library has just written",
    "ptm/text/bpe.py": "what the tokenizers library has just written",
    "ptm/plan/search.py": "the output of a process of ours",
    "ptm/hosts.py": "what the other processes of the same run say",
    "ptm/data/python_docs.py": "a cache of our own",
    "ptm/data/formats/lines.py": "a record; one that is too deep for the parser, or for who reads it, is told as damaged",
    "ptm/data/formats/trees.py": "records",
    "ptm/data/formats/unfolded.py": "answers to records",
    "ptm/study/resolution.py": "what it has just written, as it will be read",
}


def owners(tree: ast.Module) -> dict[ast.AST, str]:
    """The function that a node stands in, by its name; '' at the top."""
    found: dict[ast.AST, str] = {}

    def visit(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            found[child] = name
            visit(child, child.name if isinstance(child, ast.FunctionDef) else name)

    visit(tree, "")
    return found


def _constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _of_call(node: ast.Call, place: str) -> str | None:
    name, given = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
    last = name.rpartition(".")[2]
    if name in CALLS or last in ("extractall", "extract") and "archive" in name or last.startswith("exec") and name.startswith("os."):
        return f"calls {name}"
    if (
        "allow_pickle" in given
        and not _constant(given["allow_pickle"], False)
        or last == "load"
        and name.startswith(("np.", "numpy."))
        and "allow_pickle" not in given
    ):
        return f"{name} may read pickles; say allow_pickle=False"
    if name.startswith("yaml.") and last not in YAML:
        return f"{name} is none of {', '.join(sorted(YAML))}"
    if "shell" in given and not _constant(given["shell"], False):
        return f"{name} goes through a shell"
    if last in ("import_module", "spec_from_file_location", "exec_module", "load_module", "run_path", "run_module") and place not in LOADERS:
        return f"{name} loads code by a name, and {place} is not listed in LOADERS"
    if name in ("json.load", "json.loads") and place.partition("::")[0] not in JSON:
        return f"{name} has no bounds; use ptm.untrusted"
    return None


def violations(source: str, file: str) -> list[str]:
    """Line and reason of everything in a file that is not allowed."""
    tree = ast.parse(source)
    owner, found = owners(tree), []
    for node in ast.walk(tree):
        reason = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            reason = next((f"imports {name}" for name in names if name.split(".")[0] in MODULES), None)
        elif isinstance(node, ast.Call):
            reason = _of_call(node, f"{file}::{owner[node]}")
        elif isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in ("json.loads", "pickle", "eval", "exec") and file not in JSON:
            reason = f"hands {ast.unparse(node)} on"
        if reason is not None:
            found.append(f"{file}:{node.lineno} {reason}")
    return found


def _files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_the_source_does_nothing_of_the_kind():
    assert not [line for path in _files() for line in violations(path.read_text(), str(path.relative_to(ROOT)))]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from joblib import load", "eval(text)", "builtins.exec(text)", "compile(text, '', 'exec')", "np.load(path)", "np.load(path, allow_pickle=True)",
        "numpy.load(path, allow_pickle=given)", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)", "yaml.unsafe_load(text)", "subprocess.run(line, shell=True)",
        "subprocess.Popen(line, shell=given)", "os.system(line)", "importlib.import_module(config['module'])", "spec.loader.exec_module(module)", "__import__(name)",
        "json.loads(text)", "json.load(file)", "map(json.loads, file)", "archive.extractall(folder)", "tempfile.mktemp()", "shutil.unpack_archive(path)", "runpy.run_path(path)",
    ],
)  # fmt: skip
def test_a_line_that_does_is_found(line):
    assert violations(f"def f():\n    {line}", "ptm/x.py")


def test_lines_that_are_allowed():
    for line in (
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "subprocess.run(words)",
        "re.compile(text)",
        "np.savez_compressed(path)",
        "json.dumps(x)",
    ):
        assert not violations(line, "ptm/x.py"), line
    assert not violations("def call():\n    spec.loader.exec_module(module)", "ptm/recipe.py")


def test_the_lists_name_what_is_there():
    """Entries that nothing needs any more are taken out."""
    for place in LOADERS:
        file, _, function = place.partition("::")
        assert f"def {function}(" in (ROOT / file).read_text() and "importlib" in (ROOT / file).read_text()
    for file in JSON:
        assert re.search(r"json\.loads?\b", (ROOT / file).read_text()), file


def test_modules_of_trackers_are_named_in_the_calls():
    tree = ast.parse((ROOT / "ptm/log.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "_import"]
    assert len(calls) == 3 and all(isinstance(call.args[0], ast.Constant) for call in calls)


def test_names_of_classes_that_are_looked_up_come_from_the_code():
    """`getattr` on a module with a name that is not written out: the reference's classes, by our tables, and a recipe's function."""
    found = set()
    for path in _files():
        tree = ast.parse(path.read_text())
        modules = {(alias.asname or alias.name).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "getattr" or isinstance(node.args[1], ast.Constant):
                continue
            if ast.unparse(node.args[0]) in modules | {"module"}:
                found.add(f"{path.relative_to(ROOT)}: {ast.unparse(node.args[1])}")
    assert found == {"ptm/recipe.py: function", "ptm/hf/check.py: architecture.name"}


def test_the_journal_of_searches_holds_no_pickle():
    """Optuna pickles snapshots of journals in stores that are no files."""
    journal = pytest.importorskip("optuna.storages.journal")
    assert not hasattr(journal.JournalFileBackend, "load_snapshot")


# Names that become paths.

BAD = ("", ".", "..", "../x", "a/b", "/etc/x", "a\0b", "a\nb", "\x1b[31m", "-x", ".hidden", "a b", "~x", "x" * 300, "a\\b", "é\u202e", None, 3)


def test_names_stay_in_their_folder(tmp_path):
    for name in BAD:
        assert not untrusted.is_name(name), name
    for name in ("validation", "mnli_mismatched", "seed0", "0_one", "lr=0.1", "a.b", "step+2"):
        assert untrusted.is_name(name)
    assert untrusted.is_place("arm/seed0/pretrain") and untrusted.is_place("solo")
    for name in ("../x", "a/../b", "/a", "a//b", "a/", "a/./b", "a/\0", 3):
        assert not untrusted.is_place(name), name
    (tmp_path / "link").symlink_to("/etc")
    assert untrusted.inside(tmp_path, "a/b") and not any(untrusted.inside(tmp_path, name) for name in ("../a", "/etc/passwd", "link/passwd", "a\0", None))


@pytest.mark.parametrize("name", [name for name in BAD if isinstance(name, str) and name] + ["a.b"])
def test_an_eval_is_named_plainly(name):
    """predictions/EVAL-STEP.jsonl is named after it, and keys of the command line."""
    made = config_lib.to_dict(registry.resolve(config_lib.base(model=gpt.Config(), objective=causal.Config(), evals={"validation": loss.Config()})))
    with pytest.raises(ConfigError, match="allowed: letters, digits|not accept dots"):
        registry.resolve(made | {"evals": {name: made["evals"]["validation"]}})


def test_what_a_terminal_gets_is_text():
    assert untrusted.printable("\x1b]0;x\x07\u202e é\n\t") == "\\x1b]0;x\\x07\\u202e é\n\t"


# Requirements.


def _requirements() -> dict[str, list[str]]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    given = {"install_requires": setup["options"]["install_requires"], **setup["options.extras_require"]}
    return {name: [line for line in lines.strip().splitlines() if not line.startswith("ptm[")] for name, lines in given.items()}


def test_every_requirement_has_both_bounds():
    for extra, lines in _requirements().items():
        for line in lines:
            assert "==" in line or (">=" in line and "<" in line), f"{extra}: {line}"


def test_what_is_installed_is_within_the_bounds():
    from packaging.requirements import Requirement

    for lines in _requirements().values():
        for line in lines:
            wanted = Requirement(line)
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
            assert wanted.specifier.contains(version, prereleases=True), f"{line}: installed is {version}"
