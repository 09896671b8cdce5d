"""How a conversation is written as one text: a line `role: content` for each turn, then the role that is to go on."""

from collections.abc import Iterator, Sequence
from typing import Any

ASSISTANT = "assistant"  # the role whose turns are learned
TURNS = tuple(f"\n{role}:" for role in ("user", ASSISTANT, "system"))  # where a model that was not trained on replies alone goes on with the next turn


def _turn(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict) or not all(isinstance(message[name] if name in message else None, str) for name in ("role", "content")):
        raise ValueError(f'a turn is {str(message)[:60]!r}; allowed: {{"role": "user" or "assistant", "content": text}}')
    return message["role"], message["content"]


def replies(messages: Sequence[Any]) -> Iterator[tuple[int, str, str]]:
    """(number of the turn, text before it, content) of each turn of the assistant that something was said before. Raises ValueError for what is no conversation."""
    lines: list[str] = []
    for number, message in enumerate(messages):
        role, content = _turn(message)
        if role == ASSISTANT and lines:
            yield number, _asked(lines), content
        lines.append(f"{role}: {content}")


def reply_prompt(messages: Any) -> str:
    """The text that the assistant's next turn goes on from. Raises ValueError for what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise ValueError('messages must be a list of turns {"role": ..., "content": ...}, at least one')
    return _asked([f"{role}: {content}" for role, content in map(_turn, messages)])


def _asked(lines: Sequence[str]) -> str:
    return "\n".join([*lines, f"{ASSISTANT}:"])
