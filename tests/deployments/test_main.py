"""`python -m deployments` as a process: it serves, and when it is told to end it lets running streams end first."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.cluster

DEADLINE_S = 120.0
NUM_TOKENS = 300  # takes longer than Serve takes to close its connections


@contextmanager
def serving(*settings: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The process, with a Ray of its own, and its base URL once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "deployments", "--port", str(port), "--object-store-gb", "0.2"]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_healthy(url, process)
            yield process, url
        finally:
            process.kill()


def _wait_until_healthy(url: str, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < end and process.poll() is None, "it did not start"
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)


def test_sigterm_lets_a_running_stream_end(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_position_embeddings=2 * NUM_TOKENS)
    fields = {"prompt": [3, 4], "max_tokens": NUM_TOKENS, "ignore_eos": True, "stream": True}
    with serving(f"model={tmp_path}", "expert_slots=4", f"max_context_tokens={2 * NUM_TOKENS}") as (
        process,
        url,
    ):
        with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=DEADLINE_S) as response:
            events = (line for line in response.iter_lines() if line)
            first = next(events)
            process.send_signal(signal.SIGTERM)
            *_, last = events
        assert "error" not in first
        assert last == "data: [DONE]"
        assert process.wait(DEADLINE_S) == 0
