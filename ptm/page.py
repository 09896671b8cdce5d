"""HTML pages that need nothing but themselves: one file with the look and the helpers that all pages share, its data as data, and nothing from anywhere else."""

import base64
import hashlib
import html
import json
import re
from importlib import resources
from typing import Any

SHARED = {"shared_style": "page.css", "shared_script": "page.js"}


def render(template: str, *, title: str, data: Any) -> str:
    """A page of `template`, which places {{policy}}, {{title}}, {{data}} (JSON) and the shared parts {{shared_style}} and {{shared_script}}.

    All text reaches the page as data. Its policy lets it run its own script, by its hash, and load nothing.
    """
    folder = resources.files("ptm")
    template = _filled(template, {name: folder.joinpath(file).read_text(encoding="utf-8") for name, file in SHARED.items()})
    hashes = {tag: _hash(re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1]) for tag in ("script", "style")}
    policy = f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; base-uri 'none'; form-action 'none'"
    # No text can end its element: in a string of JSON \u003c is the same as <.
    return _filled(template, {"policy": policy, "title": html.escape(title), "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c")})


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]] if match[1] in values else match[0], template)


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
