"""What the site has besides the pages of docs/: README.md as its front page, the generated reference, notebooks, and files of the repository that pages link to.

Pages link to each other, and to files outside of docs/, as they lie in the repository, so that they can be read on a Git host too. Here each such link is turned
to the page of the site that shows the file: a Markdown file as it is, any other as its source, a folder as its list of files.
"""

import json
import logging
import posixpath
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # launch/ is no installed package, and `mkdocs` does not look into the folder that it is called in
import links
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
FRONT = {"README.md": "index.md", "README.zh.md": "zh/index.md"}
SHOWN = {
    ".py": "python", ".md": "markdown", ".ini": "ini", ".cfg": "ini", ".toml": "toml", ".sh": "bash", ".yml": "yaml", ".jsonl": "json", ".cff": "yaml", "": "text",
}  # fmt: skip
HIDDEN = "---\nsearch:\n  exclude: true\n---\n\n"  # sources would be found in place of what is said of them
FIRST = ("reference/", "troubleshooting.md")  # who searches for a key or a message wants what it means
_log = logging.getLogger("mkdocs.hooks")


def place(path: str) -> str:
    """The page of the site that shows a file or folder of the repository; of what is no page in docs/, the file itself."""
    if path in FRONT:
        return FRONT[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def origin(src_uri: str) -> str:
    """The file or folder of the repository that a page of the site shows."""
    for path, front in FRONT.items():
        if src_uri == front:
            return path
    if not src_uri.startswith("repository/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def led_to(target: str, src_uri: str) -> str | None:
    """The file or folder of the repository that a link of a page leads to; None if it stays on the page, or leaves the repository."""
    path = target.partition("#")[0]
    return None if links.outward(target) or not path else posixpath.normpath(posixpath.join(posixpath.dirname(origin(src_uri)), path))


def turned(target: str, src_uri: str) -> str:
    """The target of a link on a page, as the page's place on the site has it; a notebook's page leads to the notebook itself."""
    led = led_to(target, src_uri)
    if led is None or place(led) == src_uri:
        return target
    return posixpath.relpath(place(led), posixpath.dirname(src_uri) or ".") + "".join(target.partition("#")[1:])


def _notebook(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```" for cell in cells]
    title, *rest = texts
    return "\n\n".join([title, f"As a notebook: [{path.name}]({path.name})", *rest])


def _shown(path: str) -> str:
    """The page of a file or folder outside of docs/."""
    file = ROOT / path
    if path.endswith(".md"):
        return file.read_text(encoding="utf-8")
    if file.is_dir():
        names = sorted(item.name for item in file.iterdir() if not item.name.startswith((".", "__")) and (item.is_dir() or item.suffix in SHOWN))
        return f"{HIDDEN}# {path}/\n\n" + "\n".join(f"- [{name}]({posixpath.basename(path)}/{name})" for name in names)
    return f"{HIDDEN}# {path}\n\n~~~~~~{SHOWN[file.suffix]}\n{file.read_text(encoding='utf-8')}\n~~~~~~\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"]["slugify"] = links.anchor
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    def add(src_uri: str, text: str) -> None:
        level = InclusionLevel.NOT_IN_NAV if src_uri.startswith("repository/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, src_uri, content=text, inclusion=level))
        pages[src_uri] = text

    pages = {file.src_uri: file.content_string for file in files.documentation_pages()}
    for path, src_uri in FRONT.items():
        if (ROOT / path).is_file():
            add(src_uri, (ROOT / path).read_text(encoding="utf-8"))
    for src_uri, text in reference.pages().items():
        add(src_uri, text)
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        add(file.src_uri.replace(".ipynb", ".md"), _notebook(Path(file.abs_src_path)))
    todo = list(pages)
    for src_uri in todo:
        for led in filter(None, (led_to(target, src_uri) for target in links.targets(pages[src_uri]))):
            if place(led) not in pages and place(led).startswith("repository/") and (ROOT / led).exists():
                add(place(led), _shown(led))
                todo.append(place(led))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri.startswith(FIRST):
        page.meta["search"] = {"boost": 3}
    plain = links.CODE.sub(
        lambda code: code.group() if "\n" in code.group() else code.group().replace(r"\|", "|"), markdown
    )  # a Git host wants the | of code in tables escaped
    return links.rewritten(plain, lambda target: turned(target, page.file.src_uri))


def on_post_build(config: MkDocsConfig) -> None:
    """The index of the search as a script too, for a site that is opened from a disk."""
    index = Path(config.site_dir, "search/search_index.json").read_text(encoding="utf-8")
    Path(config.site_dir, "search/search_index.js").write_text(f"var __index = {index}", encoding="utf-8")
