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


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """The pieces that one byte-token after the other releases, flushed at the end unless stopped."""
    texts = TextStream(BYTES, [], stop)
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
