"""Short documents cut from source files: functions, classes and methods, each starting at column 0.

Files start with a docstring, a comment or an import. A prompt often starts with `def` or `class`, so the model
has to meet documents that start so. Cuts text only; reads no files and no tokens.
"""

import ast
import io
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

MAX_CHARACTERS = 6000  # about 1,700 tokens: a document fits into one training window
TEST_FOLDERS = {"idle_test", "test", "tests"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Scope = ast.Module | ast.ClassDef | Function
Block = ast.stmt | ast.excepthandler | ast.match_case  # what holds statements


def standalone_documents(sources: Mapping[str, str]) -> list[str]:
    """Cut documents from sources by path, without duplicates, in a fixed random order.

    Library files give functions and classes; a class over MAX_CHARACTERS gives its methods instead, each below the
    class's header. Test files give functions only, and no test among them: they would outnumber everything else.
    A file that this Python cannot parse gives nothing.
    """
    documents = {
        document: None
        for name, text in sources.items()
        for document in _documents(text, from_test=is_test(name))
        if len(document) <= MAX_CHARACTERS
    }
    shuffled = list(documents)
    random.Random(0).shuffle(shuffled)
    return shuffled


def is_test(name: str) -> bool:
    path = PurePosixPath(name)
    return path.name.startswith("test_") or not TEST_FOLDERS.isdisjoint(path.parts[:-1])


def _documents(text: str, *, from_test: bool) -> Iterator[str]:
    module = _parse(text)
    if module is None:
        return
    lines = io.StringIO(text).readlines()  # at \n alone, as `ast` counts; splitlines() knows more line ends
    for scope, node in _definitions(module):
        if isinstance(node, ast.ClassDef):
            if isinstance(scope, ast.Module) and not from_test:
                yield from _class_documents(lines, node)
        elif _is_plain(scope, node) and not (from_test and node.name.startswith("test")):
            yield from _function_document(lines, node)


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings(action="ignore"):
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None


def _definitions(scope: Scope) -> Iterator[tuple[Scope, ast.ClassDef | Function]]:
    """Every class and function below `scope`, each after the scope that directly holds it."""
    stack: list[ast.AST] = [*scope.body]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.ClassDef | Function):
            yield scope, node
            yield from _definitions(node)
        else:
            stack.extend(child for child in ast.iter_child_nodes(node) if isinstance(child, Block))


def _is_plain(scope: Scope, node: Function) -> bool:
    """Whether a function means the same outside of its class: it takes neither the object nor the class."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)][:1]
    return names not in (["self"], ["cls"]) and (not isinstance(scope, ast.ClassDef) or _is_static(node))


def _is_static(node: Function) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)


def _function_document(lines: list[str], node: Function) -> Iterator[str]:
    """The function at column 0, without its docstring, which its file shows already, and without @staticmethod."""
    start = node.lineno if _is_static(node) else _first_line(node)
    skipped = _docstring_lines(lines, node)
    kept = (lines[number - 1] for number in range(start, _last_line(node) + 1) if number not in skipped)
    text = "".join(line[min(node.col_offset, _indentation(line)) :] for line in kept)
    if _parse(text) is not None:
        yield text


def _class_documents(lines: list[str], node: ast.ClassDef) -> Iterator[str]:
    whole = "".join(lines[_first_line(node) - 1 : _last_line(node)])
    if len(whole) <= MAX_CHARACTERS and _parse(whole) is not None:
        yield whole
        return
    header = _header(node)
    for method in node.body:
        if isinstance(method, Function):
            text = header + "".join(lines[_first_line(method) - 1 : _last_line(method)])
            if _parse(text) is not None:
                yield text


def _header(node: ast.ClassDef) -> str:
    """`class Name(Base):` and a newline."""
    bare = ast.ClassDef(
        name=node.name, bases=node.bases, keywords=node.keywords, body=[ast.Pass()], decorator_list=[]
    )
    return ast.unparse(bare).removesuffix("    pass")


def _docstring_lines(lines: list[str], node: Function) -> range:
    """Line numbers of the docstring and the blank lines after it; empty if there is none, or nothing but it."""
    first, *rest = node.body
    if ast.get_docstring(node, clean=False) is None or not rest or first.lineno == node.lineno:
        return range(0)
    stop = _last_line(first) + 1
    while not lines[stop - 1].strip():
        stop += 1
    return range(first.lineno, stop)


def _first_line(node: ast.ClassDef | Function) -> int:
    return min([node.lineno, *(mark.lineno for mark in node.decorator_list)])


def _last_line(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))
