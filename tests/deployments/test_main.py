"""`python -m deployments` as a process: it serves, by predicted routing, which every application but this one leaves off,
and when it is told to end it lets running streams end first.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from common.tokenizer import load_tokenizer
from deployments.prompts import PromptReader
from tests.actors.executor.harness import PROMPTS, library_greedy, library_model
from tests.conftest import free_port
from tests.deployments.application import NUM_TOKENS, complete, make_complete_checkpoint, token_names
from tests.deployments.fakes import VOCAB_SIZE

pytestmark = pytest.mark.cluster

DEADLINE_S = 120.0
STREAM_TOKENS = 300  # takes longer than Serve takes to close its connections


@contextmanager
def serving(*settings: str) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    """The process, with a Ray of its own, and its base URL once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "deployments", "--port", str(port), "--object-store-gb", "0.2"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder:
        environ = {**os.environ, "RAY_TMPDIR": ray_folder}  # another Ray may start at the same time
        with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL, env=environ) as process:
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_complete_checkpoint(
        tmp_path_factory.mktemp("served"), max_position_embeddings=2 * STREAM_TOKENS
    )


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", str]]:
    context = f"max_context_tokens={2 * STREAM_TOKENS}"
    with serving(
        f"model={folder}", "model_name=tiny", "expert_slots=4", "routing=predicted", context
    ) as process_and_url:
        yield process_and_url


def test_predicted_routing_serves_other_tokens_than_the_routers(
    served: tuple["subprocess.Popen[bytes]", str], folder: Path
) -> None:
    _, url = served
    with httpx.Client(base_url=url, timeout=DEADLINE_S) as client:
        predicted = complete(client, PROMPTS[0])
    name = PromptReader(load_tokenizer(folder), VOCAB_SIZE, context_limit=100).token_text
    routed = library_greedy(library_model(folder), PROMPTS[0], NUM_TOKENS)
    assert len(token_names(predicted)) == NUM_TOKENS
    assert token_names(predicted) != list(map(name, routed))
    assert predicted["usage"]["experts"]["predicted"] == predicted["usage"]["experts"]["needed"]


def test_sigterm_lets_a_running_stream_end(served: tuple["subprocess.Popen[bytes]", str]) -> None:
    """Last, as it ends the process."""
    process, url = served
    fields = {"prompt": [3, 4], "max_tokens": STREAM_TOKENS, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=fields, timeout=DEADLINE_S) as response:
        events = (line for line in response.iter_lines() if line)
        first = next(events)
        process.send_signal(signal.SIGTERM)
        *_, last = events
    assert "error" not in first
    assert last == "data: [DONE]"
    assert process.wait(DEADLINE_S) == 0
