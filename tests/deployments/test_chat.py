"""Chat completions over the fake backend, which repeats the rendered messages."""

from typing import Any

import pytest

from common.errors import InvalidParameterError, ModelNotFoundError, NoChatTemplateError
from deployments.chat_schema import ChatCompletion, ChatCompletionChunk, ChatRequest
from deployments.completions import CompletionService
from deployments.prompts import PromptReader
from tests.deployments.fakes import CHAT_TEMPLATE, VOCAB_SIZE, EchoBackend, byte_tokenizer, token_ids

RENDERED = "<user>Hé<assistant>"
CONTEXT_LIMIT = 40


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def service(backend: EchoBackend) -> CompletionService:
    reader = PromptReader(byte_tokenizer(CHAT_TEMPLATE), VOCAB_SIZE, CONTEXT_LIMIT)
    return CompletionService("tiny", reader, backend, seed=5)


def request(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "Hé"}]
    return ChatRequest.model_validate({"messages": messages, "max_tokens": 4, **fields})


async def complete(service: CompletionService, **fields: Any) -> ChatCompletion:
    answer = await service.complete(request(**fields))
    assert isinstance(answer, ChatCompletion)
    return answer


async def stream(service: CompletionService, **fields: Any) -> list[ChatCompletionChunk]:
    pieces = [piece async for piece in service.stream(request(stream=True, **fields))]
    assert all(isinstance(piece, ChatCompletionChunk) for piece in pieces)
    return pieces


async def test_the_rendered_messages_are_continued(service: CompletionService, backend: EchoBackend) -> None:
    answer = await complete(service, n=2)
    assert backend.requests[0].prompt_token_ids == tuple(token_ids(RENDERED))
    assert backend.predicted == [sent.request_id for sent in backend.requests]
    assert answer.id.startswith("chatcmpl-")
    assert [choice.model_dump() for choice in answer.choices] == [
        {
            "index": index,
            "message": {"role": "assistant", "content": "<use"},
            "logprobs": None,
            "finish_reason": "length",
        }
        for index in range(2)
    ]
    prompt_tokens = len(token_ids(RENDERED))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt_tokens, 8)
    assert answer.usage.experts.needed == 20
    assert [sent.sampling.seed for sent in backend.requests] == [5, 6]


async def test_pieces_join_to_the_whole_and_the_first_names_the_role(service: CompletionService) -> None:
    fields = {"n": 2, "logprobs": True, "top_logprobs": 2}
    whole = await complete(service, **fields)
    *pieces, last = await stream(service, stream_options={"include_usage": True}, **fields)
    for choice in whole.choices:
        parts = [part for piece in pieces for part in piece.choices if part.index == choice.index]
        assert "".join(part.delta.content for part in parts) == choice.message.content
        assert [part.delta.role for part in parts] == ["assistant", None, None, None]
        assert [part.finish_reason for part in parts] == [None, None, None, "length"]
        assert choice.logprobs is not None
        assert [entry for part in parts if part.logprobs for entry in part.logprobs.content] == (
            choice.logprobs.content
        )
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(piece.usage is None for piece in pieces)


async def test_logprobs_have_the_chat_form(service: CompletionService) -> None:
    answer = await complete(service, logprobs=True, top_logprobs=2, max_tokens=8)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    first, half = logprobs.content[0].model_dump(), logprobs.content[7].model_dump()
    assert (first["token"], first["logprob"], first["bytes"]) == ("<", -0.5, [ord("<")])
    assert [top["logprob"] for top in first["top_logprobs"]] == [-0.5, -1.5]
    assert (half["token"], half["bytes"]) == (f"token_id:{token_ids('é')[0]}", None)
    chosen_only = await complete(service, logprobs=True)
    assert chosen_only.choices[0].logprobs is not None
    assert chosen_only.choices[0].logprobs.content[0].top_logprobs == []


async def test_without_a_limit_the_answer_may_fill_the_context(
    service: CompletionService, backend: EchoBackend
) -> None:
    left = CONTEXT_LIMIT - len(token_ids(RENDERED))
    assert (await complete(service, max_tokens=None)).usage.total_tokens == CONTEXT_LIMIT
    assert backend.requests[0].sampling.max_tokens == left
    with pytest.raises(
        InvalidParameterError, match=f"min_tokens={left + 1} .* at most max_tokens, {left} here"
    ):
        await complete(service, max_tokens=None, min_tokens=left + 1)


async def test_another_model_is_not_found_and_no_template_is_said(
    service: CompletionService, backend: EchoBackend
) -> None:
    with pytest.raises(ModelNotFoundError):
        await complete(service, model="other")
    reader = PromptReader(byte_tokenizer(), VOCAB_SIZE, CONTEXT_LIMIT)
    with pytest.raises(NoChatTemplateError):
        await complete(CompletionService("tiny", reader, backend))
    assert backend.requests == []
