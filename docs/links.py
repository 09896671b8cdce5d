"""Links of Markdown files: where they lead, and the anchors that can be led to. Knows no library: the tests use it, and so does the site."""

import re
from collections.abc import Callable

CODE = re.compile(r"^ *(```+|~~~+).*?^ *\1[`~]* *$|(?<!`)(`+)(?!`)(?:(?!\n\n).)*?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"""(\]\(|^\[[^\]\n]+\]: +|<(?:a|img)\b[^>]*?\b(?:href|src)=")([^)\s"]+)""", re.MULTILINE)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def _outside(text: str, change: Callable[[str], str]) -> str:
    """The text with what is no code changed."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def rewritten(text: str, change: Callable[[str], str]) -> str:
    """The Markdown with the target of each link and picture changed, code left as it is."""
    return _outside(text, lambda prose: LINK.sub(lambda match: match.group(1) + change(match.group(2)), prose))


def targets(text: str) -> list[str]:
    """The targets of links and pictures, in their order."""
    found: list[str] = []
    rewritten(text, lambda target: found.append(target) or target)
    return found


def outward(target: str) -> bool:
    """Whether a link leaves the repository: it names a protocol or a host."""
    return re.match(r"[a-z][a-z0-9+.-]*:|//", target, re.IGNORECASE) is not None


def anchor(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as Git hosts make it: lower case, without punctuation, a separator for each space."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a Markdown file."""
    prose = re.sub(r"^ *(```+|~~~+).*?^ *\1[`~]* *$", "", text, flags=re.DOTALL | re.MULTILINE)
    return {anchor(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in HEADING.findall(prose)}
