import asyncio
from collections.abc import AsyncGenerator

import pytest

from common.errors import EngineStoppedError, ModelNotFoundError, QueueFullError
from deployments.completions import CompletionService, merge, peek
from deployments.openai_schema import CompletionRequest
from deployments.prompts import PromptReader
from tests.deployments.fakes import VOCAB_SIZE, EchoBackend, byte_tokenizer, token_ids


@pytest.fixture
def backend() -> EchoBackend:
    return EchoBackend()


@pytest.fixture
def service(backend: EchoBackend) -> CompletionService:
    return CompletionService("tiny", PromptReader(byte_tokenizer(), VOCAB_SIZE, 100), backend, seed=5)


def request(prompt: object = "abc", **fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": prompt, "max_tokens": 4, **fields})


async def test_a_completion_holds_text_reason_and_usage(service: CompletionService) -> None:
    completion = await service.complete(request())
    assert completion.model == "tiny"
    assert completion.id.startswith("cmpl-")
    assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("abca", "length")]
    assert completion.usage is not None
    assert (
        completion.usage.prompt_tokens,
        completion.usage.completion_tokens,
        completion.usage.total_tokens,
    ) == (3, 4, 7)
    assert (completion.usage.experts.needed, completion.usage.experts.hit_rate) == (10, 0.7)


async def test_several_prompts_give_several_choices(service: CompletionService, backend: EchoBackend) -> None:
    completion = await service.complete(request(["ab", token_ids("xyz")]))
    assert [(choice.index, choice.text) for choice in completion.choices] == [(0, "abab"), (1, "xyzx")]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 8)
    assert completion.usage.experts.needed == 20
    assert len({sent.request_id for sent in backend.requests}) == 2


async def test_timings_come_in_milliseconds_to_those_who_ask(service: CompletionService) -> None:
    completion = await service.complete(request(["ab", "xyz"], timings=True))
    assert completion.usage is not None
    assert completion.model_dump()["usage"]["timings"] == {
        "queue_ms": 250.0, "prefill_ms": 500.0, "decode_ms": 2000.0, "tokens_per_s": 3.0,
    }  # fmt: skip
    assert "timings" not in (await service.complete(request())).model_dump()["usage"]
    asked = request(timings=True, stream=True, stream_options={"include_usage": True})
    *pieces, last = [piece async for piece in service.stream(asked)]
    assert all(piece.usage is None for piece in pieces)
    assert last.usage is not None and last.usage.timings is not None
    assert last.usage.timings.tokens_per_s == 1.5


async def test_every_choice_is_a_generation_of_its_own(
    service: CompletionService, backend: EchoBackend
) -> None:
    completion = await service.complete(request(["ab", "xyz"], n=3, seed=7))
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        *((index, "abab") for index in range(3)),
        *((index, "xyzx") for index in range(3, 6)),
    ]
    assert [sent.sampling.seed for sent in backend.requests] == [7, 8, 9] * 2
    assert len({sent.request_id for sent in backend.requests}) == 6
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 24)


async def test_the_prompt_comes_before_its_echoed_completion(service: CompletionService) -> None:
    asked = request(["ab", token_ids("xyz")], echo=True, n=2)
    whole = await service.complete(asked)
    assert [choice.text for choice in whole.choices] == ["ababab", "ababab", "xyzxyzx", "xyzxyzx"]
    pieces = [piece async for piece in service.stream(asked)]
    texts = [[part.text for piece in pieces for part in piece.choices if part.index == i] for i in range(4)]
    assert ["".join(text) for text in texts] == [choice.text for choice in whole.choices]
    assert texts[0][0] == "aba", "the first token brings the prompt"


@pytest.mark.parametrize("fields", [{"logprobs": 2}, {"n": 2}, {"echo": True}])
async def test_pieces_join_to_the_whole(service: CompletionService, fields: dict[str, object]) -> None:
    asked = request(["ab", "xyz"], **fields)
    whole = await service.complete(asked)
    pieces = [piece async for piece in service.stream(asked)]
    for choice in whole.choices:
        parts = [part for piece in pieces for part in piece.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        assert all(part.finish_reason is None for part in parts[:-1])
        offsets = [offset for part in parts if part.logprobs for offset in part.logprobs.text_offset]
        assert offsets == ([] if choice.logprobs is None else choice.logprobs.text_offset)
        assert ("logprobs" in fields) == (choice.logprobs is not None)
    assert len({piece.id for piece in pieces}) == 1
    assert all(piece.usage is None for piece in pieces)


async def test_a_stream_ends_with_its_usage_when_asked(service: CompletionService) -> None:
    asked = request(stream=True, stream_options={"include_usage": True})
    *pieces, last = [piece async for piece in service.stream(asked)]
    assert all(piece.choices for piece in pieces)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


async def test_logprobs_have_openais_form(service: CompletionService) -> None:
    completion = await service.complete(request("aé", logprobs=2))
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    _, first, second = token_ids("aé")
    assert logprobs.tokens == ["a", f"token_id:{first}", f"token_id:{second}", "a"]
    assert logprobs.token_logprobs == [-0.5] * 4
    assert list(logprobs.top_logprobs[0].values()) == [-0.5, -1.5]
    assert "a" in logprobs.top_logprobs[0]
    assert logprobs.text_offset[:2] == [0, 1]


async def test_the_prediction_starts_before_the_generation(
    service: CompletionService, backend: EchoBackend
) -> None:
    stream = service.stream(request(["ab", "cd"]))
    await anext(stream)
    assert backend.predicted == [sent.request_id for sent in backend.requests]
    await stream.aclose()


async def test_the_configured_seed_is_for_requests_without_one(
    service: CompletionService, backend: EchoBackend
) -> None:
    await service.complete(request())
    await service.complete(request(seed=6))
    assert [sent.sampling.seed for sent in backend.requests] == [5, 6]


async def test_another_model_is_not_found(service: CompletionService, backend: EchoBackend) -> None:
    assert (await service.complete(request(model="tiny"))).model == "tiny"
    with pytest.raises(ModelNotFoundError, match="'other' is not served here; 'tiny' is"):
        await service.complete(request(model="other"))
    assert len(backend.requests) == 1


async def test_one_failing_prompt_cancels_the_others(
    service: CompletionService, backend: EchoBackend
) -> None:
    with pytest.raises(QueueFullError):
        await service.complete(request(["hangs", "full"]))
    hanging = [sent.request_id for sent in backend.requests[:1]]
    assert backend.closed == hanging


async def test_closing_a_stream_closes_the_generation(
    service: CompletionService, backend: EchoBackend
) -> None:
    stream = service.stream(request("hangs"))
    await anext(stream)
    assert backend.closed == []
    await stream.aclose()
    assert backend.closed == [backend.requests[0].request_id]


async def test_cancelling_the_caller_closes_the_generation(
    service: CompletionService, backend: EchoBackend
) -> None:
    task = asyncio.create_task(service.complete(request("hangs")))
    async with asyncio.timeout(5):
        while not backend.requests:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert backend.closed == [backend.requests[0].request_id]


async def numbers(*items: int, error: BaseException | None = None) -> AsyncGenerator[int, None]:
    for item in items:
        yield item
    if error is not None:
        raise error


async def test_merge_keeps_the_order_of_each_stream() -> None:
    merged = [item async for item in merge([numbers(1, 2, 3), numbers(), numbers(4, 5)])]
    assert [item for index, item in merged if index == 0] == [1, 2, 3]
    assert [item for index, item in merged if index == 2] == [4, 5]


async def test_merge_learns_of_a_stream_that_somebody_else_cancelled() -> None:
    async with asyncio.timeout(5):
        with pytest.raises(EngineStoppedError, match="its request was cancelled"):
            _ = [item async for item in merge([numbers(1, error=asyncio.CancelledError())])]


async def test_peek_raises_the_early_error_and_loses_nothing() -> None:
    assert [item async for item in await peek(numbers(1, 2))] == [1, 2]
    with pytest.raises(QueueFullError):
        await peek(numbers(error=QueueFullError(1, 1)))
