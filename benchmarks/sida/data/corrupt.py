"""Small realistic mistakes in one line of code, after which it does not parse."""

import re
from dataclasses import dataclass
from random import Random

from benchmarks.sida.data.extract import parse

_TRIES = 12
# Names, numbers, quotes and operators one by one; what is between them stays with the one before.
_LEXEMES = re.compile(r"(?:\w+|[^\w\s])\s*")
_BRACKETS = "()[]{}"


@dataclass(frozen=True)
class Corrupted:
    text: str
    kind: str  # dropped, doubled or exchanged


def corrupted(line: str, random: Random) -> Corrupted | None:
    """None where a few tries do not break the line."""
    lexemes = _LEXEMES.findall(line)
    for _ in range(_TRIES):
        kind = random.choice(("dropped", "doubled", "exchanged"))
        text = _change(lexemes, kind, random)
        if text.strip() != line and parse(text.strip()) is None:
            return Corrupted(text.strip(), kind)
    return None


def _change(lexemes: list[str], kind: str, random: Random) -> str:
    changed = list(lexemes)
    if kind == "exchanged":
        position = random.randrange(len(lexemes) - 1)
        changed[position : position + 2] = reversed(changed[position : position + 2])
        return "".join(changed)
    position = _position(lexemes, random)
    if kind == "dropped":
        del changed[position]
    else:
        changed.insert(position, lexemes[position])
    return "".join(changed)


def _position(lexemes: list[str], random: Random) -> int:
    """Mostly of a bracket, where the line has any: where mistakes are made."""
    brackets = [position for position, lexeme in enumerate(lexemes) if lexeme[0] in _BRACKETS]
    if brackets and random.random() < 0.7:
        return random.choice(brackets)
    return random.randrange(len(lexemes))
