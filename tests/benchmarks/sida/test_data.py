"""Tasks made of source code: balanced, told by no text alone, apart by file, the same whenever they are built."""

import ast
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.sida.data.baselines import score_baselines
from benchmarks.sida.data.build import TOKENS, DataSize, TaskPart, build, read_record, read_task, read_text
from benchmarks.sida.data.code import Code
from benchmarks.sida.data.corrupt import corrupted
from benchmarks.sida.data.extract import FUNCTION_NAME, extract
from benchmarks.sida.data.sources import PARTS, SourceFile, part_of, read_sources
from benchmarks.sida.data.tasks import (
    GROUPS,
    TASKS,
    Example,
    TaskName,
    long_groups,
    normal_forms,
    pair_groups,
)
from benchmarks.sida.data.tokens import NO_TOKEN, Vocabulary, padded

LINES = (
    "self.assertEqual(first.value(), [1, 2])",
    "return dict(zip(names, values))",
    "total += counts[key] * (1 - rate)",
    "from package.module import (name, other)",
)
FUNCTION = "def area(self, width, height=2):\n    self.width = width\n    print(width * height, 'done')\n"
SMALL = DataSize(max_bytes=10**6, max_text_tokens=4000, train_examples=24, other_examples=8)


def source(number: int) -> str:
    """A file that gives examples of every task, none of which another number's file has."""
    words = " ".join(f"word{number}x{position} is read and then written again" for position in range(9))
    documented = "".join(
        f'''
def work_{name}_{number}(first, second, third):
    """Combine what {name}{number} holds with second.

    {words}
    """
    values_{name} = [first * {number}, second + third, first - second]
    for position_{name}, value in enumerate(values_{name}):
        if value > position_{name} + {number}:
            values_{name}.append(value * third + position_{name} - first)
        else:
            values_{name}[position_{name}] = second // (value + {number})
    result_{name} = sum(values_{name}) / max(1, len(values_{name}) - {number})
    print(first, second, third, result_{name}, "of work {name} number {number}")
    return result_{name}, values_{name}, work_{name}_{number}
'''
        for name in ("alpha", "gamma")
    )
    short = f"""
def start{number}(self, speed):
    self.speed = speed.value(name)
    print(speed, {number})
"""
    lines = "".join(
        f"constant_{number}_{row} = [value_{row} for value_{row} in range({number}, 1{row}{number})]\n"
        for row in range(4)
    )
    return documented + short + lines


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number in range(60):
        (folder / f"module_{number}.py").write_text(source(number))
    return folder


@pytest.fixture(scope="module")
def data(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    build(folder, SMALL, seed=0, roots=[sources])
    return folder


def source_file(number: int = 0) -> SourceFile:
    return SourceFile(f"package/module_{number}.py", source(number), "train")


@pytest.mark.parametrize("line", LINES)
def test_a_corrupted_line_does_not_parse(line: str) -> None:
    ast.parse(line)
    for seed in range(20):
        broken = corrupted(line, Random(seed))
        assert broken is not None
        with pytest.raises(SyntaxError):
            ast.parse(broken.text)


def test_corruptions_are_small() -> None:
    kinds = set()
    for seed in range(40):
        broken = corrupted(LINES[0], Random(seed))
        assert broken is not None
        kinds.add(broken.kind)
        assert abs(len(broken.text) - len(LINES[0])) <= len("assertEqual")
    assert kinds == {"dropped", "doubled", "exchanged"}


def test_other_names_leave_the_structure() -> None:
    code = Code(FUNCTION)
    assert code.names == ["area", "width", "height", "print"]
    renamed = Code(code.renamed(["a", "b", "c", "d"]))
    assert renamed.structure == code.structure
    assert renamed.text == "def a(self, b, c=2):\n    self.b = b\n    d(b * c, 'a')\n"


def test_code_refuses_f_strings() -> None:
    with pytest.raises(ValueError, match="f-string"):
        Code("value = f'{name}'\n")


@pytest.mark.parametrize("task", TASKS)
def test_no_text_of_a_group_tells_the_label(task: TaskName) -> None:
    parts = [found for number in range(4) if (found := extract(source_file(number))) is not None]
    groups = list(GROUPS[task](parts, 0))
    assert groups
    for group in groups:
        assert sum(example.label for example in group) * 2 == len(group)
        if task == "short":
            continue  # a line is its own label
        for first in {example.texts[0] for example in group}:
            labels = [example.label for example in group if example.texts[0] == first]
            assert sum(labels) * 2 == len(labels)


def test_the_second_function_of_a_pair_has_the_first_ones_structure_or_another_ones() -> None:
    parts = [found for number in range(4) if (found := extract(source_file(number))) is not None]
    seen = set()
    for group in pair_groups(parts, 0):
        for example in group:
            first, second = map(Code, example.texts)
            assert (first.structure == second.structure) == bool(example.label)
            assert first.text != second.text
            seen.add((example.label, example.kind))
    assert seen == {(label, kind) for label in (0, 1) for kind in ("own names", "other names")}


def test_a_documented_function_does_not_say_its_name() -> None:
    parts = extract(source_file(7))
    assert parts is not None
    group = next(long_groups([parts], 0))
    for example in group:
        assert not any("work_alpha_7" in text or "work_gamma_7" in text for text in example.texts)
        assert f"def {FUNCTION_NAME}(" in example.texts[1]
        assert '"""' not in example.texts[1]


def test_copies_that_differ_in_white_space_have_one_form() -> None:
    group, copy = [Example(("a = 1", "b"), 1, "")], [Example(("a  =  1\n", "b"), 0, "")]
    assert normal_forms(group) == normal_forms(copy) == {"a=1", "b"}


def test_a_file_stays_in_its_part_when_it_is_renamed(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"a_{number}.py").write_text(source(number))
    before = {file.text: file.part for file in read_sources([tmp_path], 10**6)}
    for number in range(8):
        (tmp_path / f"a_{number}.py").rename(tmp_path / f"b_{number}.py")
    (tmp_path / "copy.py").write_text(source(0))
    files = list(read_sources([tmp_path], 10**6))
    assert {file.text: file.part for file in files} == before
    assert len(files) == 8, "a copy is read once"


def test_parts_have_their_shares() -> None:
    counts = dict.fromkeys(PARTS, 0)
    for number in range(4000):
        counts[part_of(np.random.default_rng(number).bytes(32))] += 1
    assert counts["validation"] / 4000 == pytest.approx(0.06, abs=0.015)
    assert counts["test"] / 4000 == pytest.approx(0.10, abs=0.015)


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_balanced_and_of_their_lengths(data: Path, task: TaskName) -> None:
    shortest, longest = TOKENS[task]
    for part in PARTS:
        found = read_task(data, task, part)
        assert 0 < len(found.labels) <= (24 if part == "train" else 8)
        assert found.labels.mean() == 0.5
        assert shortest <= found.lengths.min() <= found.lengths.max() <= longest


def test_no_text_is_in_two_parts(data: Path) -> None:
    for task in TASKS:
        rows = {part: {tuple(row) for row in read_task(data, task, part).ids.tolist()} for part in PARTS}
        assert not rows["train"] & (rows["validation"] | rows["test"])
        assert not rows["validation"] & rows["test"]
    assert read_record(data)["files"]["train"] > read_record(data)["files"]["test"]


def test_the_same_sources_give_the_same_data(data: Path, sources: Path, tmp_path: Path) -> None:
    build(tmp_path, SMALL, seed=0, roots=[sources])
    for part in PARTS:
        assert np.array_equal(read_text(data, part), read_text(tmp_path, part))
        for task in TASKS:
            one, other = read_task(data, task, part), read_task(tmp_path, task, part)
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.labels, other.labels)


def test_data_are_built_once_for_each_setting(data: Path, sources: Path) -> None:
    before = (data / "short.npz").stat().st_mtime_ns
    build(data, SMALL, seed=0, roots=[sources])
    assert (data / "short.npz").stat().st_mtime_ns == before


def test_too_few_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(source(0))
    with pytest.raises(RuntimeError, match="read more of them"):
        build(tmp_path / "data", SMALL, seed=0, roots=[tmp_path])


def test_the_linear_baseline_sees_tokens_and_not_their_order() -> None:
    random = np.random.default_rng(0)
    texts = [random.permutation(np.arange(10, 20)).astype(np.int16) for _ in range(400)]
    by_order = TaskPart(
        padded(texts), np.array([int(ids[0] < ids[1]) for ids in texts]), np.array([""] * 400)
    )
    marked = [np.append(ids, np.int16(30 + number % 2)) for number, ids in enumerate(texts)]
    by_token = TaskPart(padded(marked), np.arange(400) % 2, by_order.kinds)
    scores = [
        score_baselines(part, part, vocab_size=64, separator_id=63, seed=0).bag_of_tokens
        for part in (by_order, by_token)
    ]
    assert scores[0] < 0.65
    assert scores[1] > 0.95


def test_an_example_is_its_texts_and_separators() -> None:
    vocabulary = Vocabulary()
    (ids,) = vocabulary.encode_examples([("a = 1", "b")])
    assert list(ids).count(vocabulary.separator_id) == 1
    assert ids[-1] == vocabulary.end_id
    assert padded([ids[:2], ids]).tolist()[0][2:] == [NO_TOKEN] * (len(ids) - 2)
    assert max(vocabulary.pad_id, vocabulary.first_sentinel_id) < vocabulary.size
    assert vocabulary.size % 64 == 0
