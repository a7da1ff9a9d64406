import pytest

from common.errors import ContextTooLongError, InvalidParameterError, VocabularyError
from deployments.prompts import PromptReader
from tests.deployments.fakes import VOCAB_SIZE, byte_tokenizer, token_ids


@pytest.fixture
def reader() -> PromptReader:
    return PromptReader(byte_tokenizer(), VOCAB_SIZE, context_limit=20)


def test_text_and_its_token_ids_are_the_same_prompt(reader: PromptReader) -> None:
    assert reader.read("héllo", 4) == reader.read(token_ids("héllo"), 4)
    assert len(reader.read("héllo", 4)) == 6


def test_refuses_what_the_model_cannot_take(reader: PromptReader) -> None:
    with pytest.raises(InvalidParameterError, match="prompt='' is not possible: at least one token"):
        reader.read("", 4)
    with pytest.raises(VocabularyError, match="token id 256 is not in the vocabulary of 256 tokens"):
        reader.read([1, 256], 4)
    with pytest.raises(VocabularyError):
        reader.read([-1], 4)
    assert len(reader.read("x" * 16, 4)) == 16
    with pytest.raises(
        ContextTooLongError, match="17 tokens and max_tokens is 4, together 21; the limit is 20"
    ):
        reader.read("x" * 17, 4)


def test_without_a_tokenizer_only_token_ids_are_served() -> None:
    reader = PromptReader(None, VOCAB_SIZE, context_limit=20)
    assert reader.read([1, 2], 4) == (1, 2)
    assert reader.token_text(7) == "token_id:7"
    with pytest.raises(InvalidParameterError, match="the model's folder has no tokenizer; send token ids"):
        reader.read("text", 4)
    with pytest.raises(InvalidParameterError, match=r"stop=\['x'\] is not possible"):
        reader.check_stops(["x"])


def test_half_a_character_is_written_as_its_id(reader: PromptReader) -> None:
    assert reader.token_text(token_ids("a")[0]) == "a"
    half = token_ids("é")[0]
    assert reader.token_text(half) == f"token_id:{half}"
