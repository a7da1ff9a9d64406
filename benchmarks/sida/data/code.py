"""Short Python code as lexical tokens: its structure without names, and other names in it.

Code is text without comments and f-strings, as `ast.unparse` writes it.
"""

import io
import keyword
import tokenize
from collections.abc import Sequence

NAME, STRING = "NAME", "STRING"
_KEPT_NAMES = {"self", "cls"}
_LAYOUT = {tokenize.NEWLINE: "NEWLINE", tokenize.INDENT: "INDENT", tokenize.DEDENT: "DEDENT"}
_IGNORED = {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}

Span = tuple[int, int]  # start and stop in the text


class Code:
    """
    Args:
        text: parses.
    Raises:
        ValueError: it is not ASCII, or has f-strings, whose names one version of Python sees and another does not.
    """

    def __init__(self, text: str) -> None:
        if not text.isascii():
            raise ValueError("not ASCII")
        self.text = text
        self._line_starts = [0]
        for line in text.splitlines(keepends=True):
            self._line_starts.append(self._line_starts[-1] + len(line))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        self._tokens = [token for token in tokens if token.type not in _IGNORED]
        if any(_is_f_string(token) for token in self._tokens):
            raise ValueError("an f-string")

    @property
    def structure(self) -> tuple[str, ...]:
        """Every token: keywords, operators and numbers as they are, layout, and names and strings as NAME and STRING."""
        return tuple(map(_structure, self._tokens))

    @property
    def names(self) -> list[str]:
        """Distinct names, in the order of their first use; not keywords, `self` and `cls`."""
        return list(dict.fromkeys(token.string for token in self._tokens if _structure(token) == NAME))

    def renamed(self, names: Sequence[str]) -> str:
        """The text with every name exchanged, and every string for one that holds a new name.

        Args:
            names: what to write for each of the own ones; the rest is not used.
        """
        old = self.names
        new = dict(zip(old, names[: len(old)], strict=True))
        strings: dict[str, str] = {}
        replaced: list[tuple[Span, str]] = []
        for token in self._tokens:
            kind = _structure(token)
            if kind == NAME:
                replaced.append((self._span(token), new[token.string]))
            elif kind == STRING:
                content = strings.setdefault(token.string, repr(names[len(strings) % len(old)]))
                replaced.append((self._span(token), content))
        return _replace(self.text, replaced)

    def _span(self, token: tokenize.TokenInfo) -> Span:
        (start_row, start), (stop_row, stop) = token.start, token.end
        return self._line_starts[start_row - 1] + start, self._line_starts[stop_row - 1] + stop


def _structure(token: tokenize.TokenInfo) -> str:
    if token.type in _LAYOUT:
        return _LAYOUT[token.type]
    if token.type == tokenize.STRING:
        return STRING
    is_name = token.type == tokenize.NAME and not keyword.iskeyword(token.string)
    return NAME if is_name and token.string not in _KEPT_NAMES else token.string


def _is_f_string(token: tokenize.TokenInfo) -> bool:
    quoted = token.string.lstrip("bBrRuUfF")
    prefix = token.string[: len(token.string) - len(quoted)].lower()
    return tokenize.tok_name[token.type].startswith("FSTRING") or (
        token.type == tokenize.STRING and "f" in prefix
    )


def _replace(text: str, replaced: Sequence[tuple[Span, str]]) -> str:
    """Args: replaced: disjoint spans in their order, and what to write there."""
    parts, position = [], 0
    for (start, stop), new in replaced:
        parts += [text[position:start], new]
        position = stop
    return "".join([*parts, text[position:]])
