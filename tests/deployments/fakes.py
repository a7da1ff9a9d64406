"""Stand-ins for what lies behind the ingress: a tokenizer of single bytes, and a generator that repeats its prompt."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import ContextTooLongError, EngineStoppedError, QueueFullError
from common.generation import (
    ExpertUsage,
    GenerationChunk,
    GenerationRequest,
    RequestTimings,
    TokenLogprobs,
)

VOCAB_SIZE = 256
TIMINGS = RequestTimings(queue_s=0.25, prefill_s=0.5, decode_s=2.0)
USAGE = ExpertUsage(needed=10, predicted=8, missed=3, moved_bytes=1000)


# "<role>text" of every message, and what begins the answer; it wants a system message to be the first.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}{{ raise_exception('system\nmust be first') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Every byte of UTF-8 is a token, so half a character is one too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = TokenizersTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)


def write_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    byte_tokenizer(chat_template).save_pretrained(folder)


LABELS = ("short", "long")  # texts of more than five tokens are long


async def echo(request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
    """Repeat the prompt's tokens, one chunk each, until `max_tokens`; classifications get their logits."""
    tokenizer = byte_tokenizer()
    prompt, sampling = request.prompt_token_ids, request.sampling
    if request.request_id.startswith("classify-"):
        yield GenerationChunk((), "", (), "stop", USAGE, TIMINGS, label_logits=(5.5, float(len(prompt))))
        return
    for step in range(sampling.max_tokens):
        await asyncio.sleep(0)
        token_id = prompt[step % len(prompt)]
        last = step + 1 == sampling.max_tokens
        yield GenerationChunk(
            token_ids=(token_id,),
            text=tokenizer.decode([token_id]),
            logprobs=_logprobs(token_id, sampling.logprobs),
            finish_reason="length" if last else None,
            experts=USAGE if last else None,
            timings=TIMINGS if last else None,
        )


def _logprobs(token_id: int, count: int | None) -> tuple[TokenLogprobs, ...]:
    if count is None:
        return ()
    top = tuple(((token_id + rank) % VOCAB_SIZE, -0.5 - rank) for rank in range(count))
    return (TokenLogprobs(token_id, -0.5, top),)


class EchoBackend:
    """A `Backend` whose prompts choose what goes wrong: see `generate`."""

    def __init__(self) -> None:
        self.predicted: list[str] = []
        self.requests: list[GenerationRequest] = []
        self.closed: list[str] = []

    def predict(self, request: GenerationRequest) -> None:
        self.predicted.append(request.request_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[GenerationChunk, None]:
        """Echo; the prompts "full", "long" and "bug" fail at once, "dies" after its first chunk, "hangs" never ends."""
        self.requests.append(request)
        text = byte_tokenizer().decode(list(request.prompt_token_ids))
        raise_early(text)
        try:
            async for chunk in echo(request):
                yield chunk
                if text == "dies":
                    raise EngineStoppedError("the test says so")
                if text == "hangs":
                    await asyncio.Event().wait()
        finally:
            self.closed.append(request.request_id)

    async def expert_report(self) -> dict[str, Any]:
        return {"store": {}, "predictions": {}, "executors": [{"layers": []}], "unreachable_executors": 0}

    async def live_view(self) -> dict[str, Any]:
        return {"executors": [], "unreachable_executors": 0}


def raise_early(text: str) -> None:
    errors: dict[str, Exception] = {
        "full": QueueFullError(4, 4),
        "long": ContextTooLongError(5, 6, 7),
        "bug": KeyError("secret detail"),
    }
    if text in errors:
        raise errors[text]


def token_ids(text: str) -> list[int]:
    ids: Sequence[int] = byte_tokenizer().encode(text)
    return list(ids)
