"""A corpus that every Python carries: the topics of its language reference and the docstrings of its standard library."""

import ast
import contextlib
import hashlib
import json
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator
from pydoc_data.topics import topics

from ptm.data import files

SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
VERSION = 2  # of the extraction below; raise it when the text changes


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text:
        yield f"{name}\n{text}\n"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")


def _modules() -> Iterator[tuple[str, str]]:
    root = sysconfig.get_paths()["stdlib"]
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - SKIPPED)
        for file in sorted(names):
            if not file.endswith(".py"):
                continue
            path = os.path.join(folder, file)
            name = os.path.relpath(path, root)[: -len(".py")].replace(os.sep, ".").removesuffix(".__init__")
            try:
                with open(path, encoding="utf-8") as handle:
                    tree = ast.parse(handle.read())
            except (OSError, SyntaxError, ValueError):
                continue  # templates and sources in other encodings
            text = "\n".join(_docstrings(tree, name))
            if text:
                yield f"python_docs/module/{name}", text


def _extract() -> list[tuple[str, str]]:
    return [*((f"python_docs/topic/{name}", text) for name, text in sorted(topics.items()) if text.strip()), *_modules()]


def _cache_path() -> str:
    # Two installations of one version may differ in their modules, so the library's folder is part of the key.
    place = hashlib.sha256(sysconfig.get_paths()["stdlib"].encode()).hexdigest()[:8]
    return os.path.join(files.cache_folder(), f"python_docs-{platform.python_version()}-{place}-{VERSION}.jsonl")


def documents() -> list[tuple[str, str]]:
    """(id, text) of every document, about 2 MB; extracted once (seconds) and kept in the user's cache folder where that can be written."""
    path = _cache_path()
    with contextlib.suppress(OSError), open(path, "rb") as file:
        digest, _, content = file.read().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() == digest:  # else it was damaged, and is made again
            return [(entry["id"], entry["text"]) for entry in map(json.loads, content.splitlines())]
    found = _extract()
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        content = "".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in found).encode()
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix=".tmp", delete=False) as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        os.replace(file.name, path)
    return found
