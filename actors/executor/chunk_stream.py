"""Carries chunks from the engine's thread to a coroutine. A slow reader gets several steps in one chunk, never fewer
tokens; so does one of many, because a chunk costs the servers on its way as much as a step costs a fast engine.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence

from common.generation import GenerationChunk


class ChunkPace:
    """Shares a number of chunks per second evenly out among the streams that are open."""

    def __init__(self, chunks_per_s: float) -> None:
        self._chunks_per_s = chunks_per_s
        self.num_streams = 0

    @property
    def interval_s(self) -> float:
        """Between two chunks of one stream."""
        return self.num_streams / self._chunks_per_s


class ChunkStream:
    """A chunk sink that one coroutine iterates over; it ends after the chunk with a finish reason."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pace: ChunkPace) -> None:
        self._loop, self._pace = loop, pace
        self._queue: asyncio.Queue[GenerationChunk | Exception] = asyncio.Queue()

    def put(self, chunk: GenerationChunk) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, chunk)

    def fail(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, error)

    async def __aiter__(self) -> AsyncGenerator[GenerationChunk, None]:
        self._pace.num_streams += 1
        try:
            finished, sent_at_s = False, float("-inf")
            while not finished:
                items = [await self._queue.get()]
                early_s = sent_at_s + self._pace.interval_s - self._loop.time()
                if early_s > 0:
                    await asyncio.sleep(early_s)
                while not self._queue.empty():
                    items.append(self._queue.get_nowait())
                sent_at_s = self._loop.time()
                chunks = [item for item in items if isinstance(item, GenerationChunk)]
                if chunks:
                    merged = merge_chunks(chunks)
                    finished = merged.finish_reason is not None
                    yield merged
                for item in items:
                    if isinstance(item, Exception):
                        raise item
        finally:
            self._pace.num_streams -= 1


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
        label_logits=last.label_logits,
    )
