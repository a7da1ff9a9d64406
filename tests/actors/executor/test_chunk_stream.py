"""Chunks on their way to a reader: none lost or late at the end, few where there are many streams."""

import asyncio

import pytest

from actors.executor.chunk_stream import ChunkPace, ChunkStream
from common.generation import GenerationChunk


def put(stream: ChunkStream, token: int, last: bool = False) -> None:
    stream.put(GenerationChunk((token,), f"<{token}>", finish_reason="length" if last else None))


async def read(stream: ChunkStream, chunks: list[GenerationChunk]) -> None:
    """Into a list, which an error leaves with what came before it."""
    async for chunk in stream:
        chunks.append(chunk)  # noqa: PERF401


async def test_a_stream_alone_gets_every_token_at_once() -> None:
    pace, chunks = ChunkPace(1e6), list[GenerationChunk]()
    stream = ChunkStream(asyncio.get_running_loop(), pace)
    reader = asyncio.create_task(read(stream, chunks))
    for token in range(5):
        put(stream, token, last=token == 4)
        await asyncio.sleep(0.01)
    await reader
    assert [chunk.token_ids for chunk in chunks] == [(0,), (1,), (2,), (3,), (4,)]
    assert pace.num_streams == 0


async def test_many_streams_share_the_chunks_and_lose_no_token() -> None:
    pace = ChunkPace(100.0)
    loop = asyncio.get_running_loop()
    streams = [ChunkStream(loop, pace) for _ in range(10)]
    read_chunks = [list[GenerationChunk]() for _ in streams]
    readers = [
        asyncio.create_task(read(stream, chunks)) for stream, chunks in zip(streams, read_chunks, strict=True)
    ]
    for token in range(50):
        for stream in streams:
            put(stream, token, last=token == 49)
        await asyncio.sleep(0.01)
    await asyncio.gather(*readers)
    for chunks in read_chunks:
        assert [token for chunk in chunks for token in chunk.token_ids] == list(range(50))
        assert "".join(chunk.text for chunk in chunks) == "".join(f"<{token}>" for token in range(50))
        assert len(chunks[0].token_ids) == 1, "the first one does not wait"
        assert len(chunks) < 15, "half a second has 5 intervals"


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    pace, chunks = ChunkPace(1.0), list[GenerationChunk]()
    stream = ChunkStream(asyncio.get_running_loop(), pace)
    put(stream, 7)
    stream.fail(ValueError("over"))
    with pytest.raises(ValueError, match="over"):
        await read(stream, chunks)
    assert [chunk.token_ids for chunk in chunks] == [(7,)]
    assert pace.num_streams == 0
