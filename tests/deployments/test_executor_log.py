import logging
from collections.abc import Iterator

import pytest

from common.generation import GenerationChunk, GenerationRequest, SamplingParams
from deployments.executor import _LogEntry
from tests.deployments.fakes import TIMINGS, USAGE


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("ray.serve")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        yield caplog
    logger.removeHandler(caplog.handler)


def test_a_request_that_ends_is_one_line(lines: pytest.LogCaptureFixture) -> None:
    entry = _LogEntry(GenerationRequest("r1", (1, 2, 3), SamplingParams()))
    entry.take(GenerationChunk((7,), "a"))
    entry.take(GenerationChunk((8, 9), "b", finish_reason="stop", experts=USAGE, timings=TIMINGS))
    entry.write()
    assert [record.getMessage() for record in lines.records] == [
        "request r1 ended: status=stop prompt_tokens=3 generated_tokens=3 queue_ms=250.0 prefill_ms=500.0 "
        "decode_ms=2000.0 experts_needed=10 experts_missed=3"
    ]


def test_a_cancelled_request_is_one_too(lines: pytest.LogCaptureFixture) -> None:
    entry = _LogEntry(GenerationRequest("r1", (1, 2, 3), SamplingParams()))
    entry.take(GenerationChunk((7,), "a"))
    entry.write()
    (line,) = [record.getMessage() for record in lines.records]
    assert line == "request r1 ended: status=cancelled prompt_tokens=3 generated_tokens=1"
