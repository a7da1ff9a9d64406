"""Three balanced tasks that mirror SST-2, MRPC and MultiRC in length and kind. Knows no tokens.

Examples come in groups of as many positives as negatives that are made of the same texts, so that no text by itself tells
its label. A group lies within one part.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Literal, TypeVar, get_args

from benchmarks.sida.data.code import Code
from benchmarks.sida.data.corrupt import corrupted
from benchmarks.sida.data.extract import FileParts, without_names

TaskName = Literal["short", "pair", "long"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
MIRRORED: dict[TaskName, str] = {"short": "SST-2", "pair": "MRPC", "long": "MultiRC"}
QUESTIONS: dict[TaskName, str] = {
    "short": "does this line parse",
    "pair": "are these the same function with other names",
    "long": "does this docstring belong to this function",
}

OWN_NAMES_SHARE = 0.5  # of pairs whose second function has the first one's names, in another order
NEIGHBOURS = 512  # texts among which those of about one length meet


@dataclass(frozen=True)
class Example:
    texts: tuple[str, ...]  # one, or two that are compared
    label: int  # 1 where the question's answer is yes
    kind: str  # of group


Group = list[Example]


def short_groups(files: Sequence[FileParts], seed: int) -> Iterator[Group]:
    """A line of code, and the same one with a small corruption."""
    random = Random(f"short {seed}")
    for line in _shuffled(dict.fromkeys(line for file in files for line in file.lines), random):
        if (broken := corrupted(line, random)) is not None:
            yield [Example((line,), 1, broken.kind), Example((broken.text,), 0, broken.kind)]


def pair_groups(files: Sequence[FileParts], seed: int) -> Iterator[Group]:
    """Two functions about as long: each beside itself with other names, and beside the other one with them."""
    random = Random(f"pair {seed}")
    functions = _shuffled(dict.fromkeys(text for file in files for text in file.short_functions), random)
    for texts in _of_similar_length(functions, len, random):
        twins = [Code(text) for text in texts]
        if twins[0].structure == twins[1].structure:
            continue
        most = max(len(twin.names) for twin in twins)
        group: Group = []
        for first in twins:
            kind, names = _new_names(first.names, most, functions, random)
            group += [
                Example((first.text, second.renamed(names)), int(first is second), kind) for second in twins
            ]
        yield group


def _new_names(own: list[str], count: int, functions: Sequence[str], random: Random) -> tuple[str, list[str]]:
    """At least so many: those of other functions, or first the own ones, none in its place. Says which, too."""
    kind, names = "other names", list[str]()
    if random.random() < OWN_NAMES_SHARE:
        shift = random.randrange(1, len(own))
        kind, names = "own names", own[shift:] + own[:shift]
    while len(names) < count:
        others = Code(random.choice(functions)).names
        names = list(dict.fromkeys([*names, *_shuffled(others, random)]))
    return kind, names


def long_groups(files: Sequence[FileParts], seed: int) -> Iterator[Group]:
    """Two functions with docstrings about as long: each beside its own docstring, and beside the other one's."""
    random = Random(f"long {seed}")
    distinct = {each.docstring: each for file in files for each in file.documented}
    documented = _shuffled(distinct.values(), random)
    for twins in _of_similar_length(documented, lambda each: len(each.docstring), random):
        names = [each.name for each in twins]
        docstrings = [without_names(each.docstring, names) for each in twins]
        sources = [without_names(each.source, names) for each in twins]
        yield [
            Example((docstring, source), int(i == j), "")
            for i, docstring in enumerate(docstrings)
            for j, source in enumerate(sources)
        ]


GROUPS: dict[TaskName, Callable[[Sequence[FileParts], int], Iterator[Group]]] = {
    "short": short_groups,
    "pair": pair_groups,
    "long": long_groups,
}


def normal_forms(group: Group) -> set[str]:
    """Of its texts: equal for copies that differ in white space.

    Copies of a function in two files must not be trained on in one part and asked for in another.
    """
    return {"".join(text.split()) for example in group for text in example.texts}


Item = TypeVar("Item")


def _of_similar_length(
    items: Sequence[Item], length: Callable[[Item], int], random: Random
) -> Iterator[tuple[Item, Item]]:
    for start in range(0, len(items), NEIGHBOURS):
        ordered = sorted(items[start : start + NEIGHBOURS], key=length)
        yield from _shuffled(pairwise(ordered), random)


def _shuffled(items: Iterable[Item], random: Random) -> list[Item]:
    found = list(items)
    random.shuffle(found)
    return found
