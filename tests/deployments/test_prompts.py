import pytest

from common.errors import (
    ContextTooLongError,
    InvalidParameterError,
    NoChatTemplateError,
    VocabularyError,
)
from deployments.chat_schema import ChatMessage
from deployments.prompts import PromptReader
from tests.deployments.fakes import CHAT_TEMPLATE, VOCAB_SIZE, byte_tokenizer, token_ids


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


def message(role: str, content: object) -> ChatMessage:
    return ChatMessage.model_validate({"role": role, "content": content})


CHAT = [message("system", "Be brief."), message("user", "Hi")]


def test_messages_are_read_as_the_template_writes_them() -> None:
    reader = PromptReader(byte_tokenizer(CHAT_TEMPLATE), VOCAB_SIZE, context_limit=60)
    rendered = "<system>Be brief.<user>Hi<assistant>"
    assert reader.read_messages(CHAT, None) == tuple(token_ids(rendered))
    with pytest.raises(ContextTooLongError) as caught:
        reader.read_messages(CHAT, 60 - len(rendered) + 1)
    assert caught.value.param == "messages"


def test_a_template_that_refuses_messages_is_the_requests_fault() -> None:
    reader = PromptReader(byte_tokenizer(CHAT_TEMPLATE), VOCAB_SIZE, context_limit=60)
    with pytest.raises(InvalidParameterError, match="template refuses them: system must be first") as caught:
        reader.read_messages(CHAT[::-1], 1)
    assert caught.value.param == "messages"


def test_without_a_tokenizer_or_a_template_there_is_no_chat(reader: PromptReader) -> None:
    with pytest.raises(NoChatTemplateError, match="no chat template, .*; send a prompt to /v1/completions"):
        reader.read_messages(CHAT, 1)
    with pytest.raises(NoChatTemplateError, match="the model has no tokenizer"):
        PromptReader(None, VOCAB_SIZE, context_limit=60).read_messages(CHAT, 1)


def test_token_ids_become_text_again(reader: PromptReader) -> None:
    assert reader.decode(token_ids("héllo"), "tokens") == "héllo"
    assert reader.decode([], "tokens") == ""
    assert (reader.echo("text"), reader.echo(token_ids("ids"))) == ("text", "ids")
    with pytest.raises(VocabularyError) as caught:
        reader.decode([256], "tokens")
    assert caught.value.param == "tokens"
    without = PromptReader(None, VOCAB_SIZE, context_limit=60)
    with pytest.raises(InvalidParameterError, match="tokens=.* no tokenizer"):
        without.decode([1], "tokens")
    with pytest.raises(InvalidParameterError, match="echo=.* no tokenizer"):
        without.echo([1])


def test_an_encoder_and_its_completion_have_the_limit_each() -> None:
    reader = PromptReader(None, VOCAB_SIZE, context_limit=20, has_encoder=True)
    prompt = [1] * 20
    assert reader.read(prompt, 20) == tuple(prompt)
    assert reader.room_after(prompt) == 20
    with pytest.raises(ContextTooLongError, match="the prompt has 21 tokens; the limit is 20"):
        reader.read([1] * 21, None)
    with pytest.raises(InvalidParameterError, match="max_tokens=21 is not possible: at most 20"):
        reader.read([1], 21)
