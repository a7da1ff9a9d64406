"""Carries chunks from the engine's thread to a coroutine. A slow reader gets several steps in one chunk, never fewer
tokens.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from common.generation import GenerationChunk


class ChunkStream:
    """A chunk sink that one coroutine iterates over; it ends after the chunk with a finish reason."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[GenerationChunk | Exception] = asyncio.Queue()

    def put(self, chunk: GenerationChunk) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, chunk)

    def fail(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, error)

    async def __aiter__(self) -> AsyncIterator[GenerationChunk]:
        finished = False
        while not finished:
            items = [await self._queue.get()]
            while not self._queue.empty():
                items.append(self._queue.get_nowait())
            chunks = [item for item in items if isinstance(item, GenerationChunk)]
            if chunks:
                merged = merge_chunks(chunks)
                finished = merged.finish_reason is not None
                yield merged
            for item in items:
                if isinstance(item, Exception):
                    raise item


def merge_chunks(chunks: Sequence[GenerationChunk]) -> GenerationChunk:
    """Several consecutive chunks of one request as one."""
    last = chunks[-1]
    return GenerationChunk(
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        logprobs=tuple(logprobs for chunk in chunks for logprobs in chunk.logprobs),
        finish_reason=last.finish_reason,
        experts=last.experts,
        timings=last.timings,
    )
