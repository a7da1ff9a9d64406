"""Incremental text: whole characters, stop strings across tokens, nothing lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from actors.executor.text_stream import TextStream

_ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
BYTES = Tokenizer(models.BPE({character: index for index, character in enumerate(_ALPHABET)}, []))
BYTES.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES.decoder = decoders.ByteLevel()


def stream(text: str, stop: tuple[str, ...] = (), min_tokens: int = 0) -> tuple[list[str], bool]:
    """The pieces that one byte-token after the other releases, flushed at the end unless stopped."""
    texts = TextStream(BYTES, [], stop, min_tokens)
    pieces = []
    for token_id in BYTES.encode(text).ids:
        pieces.append(texts.push(token_id))
        if texts.stopped:
            return pieces, True
    return [*pieces, texts.flush()], False


def test_releases_whole_characters_only() -> None:
    pieces, _ = stream("aé")
    assert pieces == ["a", "", "é", ""]


@pytest.mark.parametrize("stop", [("END",), ("ND", "END"), ("D", "END")])
def test_stops_before_the_earliest_stop_string(stop: tuple[str, ...]) -> None:
    pieces, stopped = stream("say END now", stop)
    assert stopped
    assert (
        "".join(pieces)
        == "say END now"[: min("say END now".index(s) for s in stop if s in "say END"[: 4 + 3])]
    )


def test_holds_back_what_may_become_a_stop_string() -> None:
    pieces, stopped = stream("xENx", ("END",))
    assert pieces == ["x", "", "", "ENx", ""]
    assert not stopped


def test_flush_gives_what_was_held_back() -> None:
    pieces, stopped = stream("xEN", ("END",))
    assert ("".join(pieces), stopped) == ("xEN", False)


def test_broken_character_at_the_end_becomes_a_replacement_character() -> None:
    texts = TextStream(BYTES, [], ())
    first_half = BYTES.encode("é").ids[0]
    assert texts.push(first_half) == ""
    assert texts.flush() == "\ufffd"


def test_without_a_tokenizer_there_is_no_text() -> None:
    texts = TextStream(None, [], ())
    assert texts.push(3) + texts.flush() == ""


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_text_equals_the_whole_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped = stream(text, tuple(stops))
    ends = [text.index(stop) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert "".join(pieces) == text
    else:  # the stop that was complete first, which need not be the one that begins first
        assert text.startswith("".join(pieces))
        assert any(text["".join(pieces).__len__() :].startswith(stop) for stop in stops)


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, "x"), (4, "x"), (5, "xENDxx"), (9, "xENDxx"), (10, "xENDxxENDx")],
)
def test_stop_strings_before_min_tokens_are_text(min_tokens: int, expected: str) -> None:
    pieces, stopped = stream("xENDxxENDx", ("END",), min_tokens)
    assert ("".join(pieces), stopped) == (expected, expected != "xENDxxENDx")


@given(
    st.text("abc", max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
    st.integers(0, 13),
)
def test_the_first_stop_that_ends_at_min_tokens_or_later_ends_the_text(
    text: str, stops: list[str], min_tokens: int
) -> None:
    pieces, stopped = stream(text, tuple(stops), min_tokens)
    ends = [end for end in range(max(1, min_tokens), len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert stopped == bool(ends)
    if ends:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        assert "".join(pieces) == text[: ends[0] - longest]
    else:
        assert "".join(pieces) == text
