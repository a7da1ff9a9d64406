"""What the tasks are made of, taken from one source file: lines, short functions, documented functions. Chooses nothing."""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from benchmarks.sida.data.code import Code
from benchmarks.sida.data.sources import Part, SourceFile

MAX_LINES, MAX_SHORT_FUNCTIONS = 40, 40  # of one file, so that no project makes up most of a task
LINE_CHARS = (40, 120)
SHORT_FUNCTION_LINES, SHORT_FUNCTION_CHARS = (2, 8), (40, 200)
DOCSTRING_CHARS, DOCUMENTED_CHARS = (80, 1200), (700, 2400)
FUNCTION_NAME = "function"  # instead of a documented one's own, which would tell

_LINES = (
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Expr,
    ast.Return,
    ast.Raise,
    ast.Assert,
    ast.Import,
    ast.ImportFrom,
)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Documented:
    """A function and its docstring, apart."""

    name: str
    docstring: str
    source: str  # without docstring and decorators


@dataclass(frozen=True)
class FileParts:
    name: str
    part: Part
    text: str
    lines: list[str]  # statements that stand on one line
    short_functions: list[str]  # as `ast.unparse` writes them, without decorators and types
    documented: list[Documented]


def extract(file: SourceFile) -> FileParts | None:
    """None for a file that does not parse."""
    tree = parse(file.text)
    if tree is None:
        return None
    rows = file.text.splitlines()
    nodes = list(ast.walk(tree))
    functions = [node for node in nodes if isinstance(node, _Function)]
    random = Random(file.name)
    return FileParts(
        file.name,
        file.part,
        file.text,
        _some(_lines(nodes, rows), MAX_LINES, random),
        _some(_short_functions(functions), MAX_SHORT_FUNCTIONS, random),
        [found for node in functions if (found := _documented(node, rows)) is not None],
    )


def parse(text: str) -> ast.Module | None:
    """None where it does not parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes and literals in what others wrote
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return None


def _some(items: Iterator[str], most: int, random: Random) -> list[str]:
    found = list(dict.fromkeys(items))
    return found if len(found) <= most else random.sample(found, most)


def _lines(nodes: list[ast.AST], rows: list[str]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, _LINES) and node.lineno == node.end_lineno and not _is_docstring(node):
            line = rows[node.lineno - 1].strip()
            if LINE_CHARS[0] <= len(line) <= LINE_CHARS[1] and parse(line) is not None:
                yield line


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _short_functions(functions: list[_Function]) -> Iterator[str]:
    for node in functions:
        if _num_lines(node) > 2 * SHORT_FUNCTION_LINES[1] or ast.get_docstring(node) is not None:
            continue
        text = ast.unparse(_bare(node)) + "\n"
        fits = SHORT_FUNCTION_CHARS[0] <= len(text) <= SHORT_FUNCTION_CHARS[1]
        if fits and text.count("\n") <= SHORT_FUNCTION_LINES[1] and _is_code(text):
            yield text


def _num_lines(node: _Function) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _bare(node: _Function) -> _Function:
    """Without decorators and types."""
    node.decorator_list, node.returns = [], None
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return node


def _is_code(text: str) -> bool:
    try:
        return len(Code(text).names) > 2
    except ValueError:
        return False


def _documented(node: _Function, rows: list[str]) -> Documented | None:
    docstring = ast.get_docstring(node)
    if (
        docstring is None
        or len(node.body) < 2
        or not DOCSTRING_CHARS[0] <= len(docstring) <= DOCSTRING_CHARS[1]
    ):
        return None
    statement = node.body[0]
    assert statement.end_lineno is not None
    head, body = rows[node.lineno - 1 : statement.lineno - 1], rows[statement.end_lineno : node.end_lineno]
    source = textwrap.dedent("\n".join([*head, *body])).strip() + "\n"
    if (
        not DOCUMENTED_CHARS[0] <= len(source) + len(docstring) <= DOCUMENTED_CHARS[1]
        or parse(source) is None
    ):
        return None
    return Documented(node.name, docstring, source)


def without_names(text: str, names: list[str]) -> str:
    """The text with each of these words exchanged for FUNCTION_NAME."""
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", FUNCTION_NAME, text)
