"""What the tests of the whole application share: starting it, asking it, and finding its processes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ray import serve

from actors.predictor.hash_function import save_hash_function
from deployments.app import build
from tests.actors.predictor.conftest import make_function
from tests.deployments.fakes import VOCAB_SIZE, write_tokenizer
from tests.tiny_models import make_checkpoint

NUM_TOKENS = 10
EXACT_APP = "exact"  # of the fixture `exact`
DEADLINE_S = 120.0


def make_complete_checkpoint(folder: Path, **config: Any) -> Path:
    """A tiny model with a tokenizer and a (random) hash function."""
    make_checkpoint("qwen3_moe", folder, vocab_size=VOCAB_SIZE, **config)
    write_tokenizer(folder)
    save_hash_function(make_function(folder), folder / "hash_function")
    return folder


@contextmanager
def running(serve_url: str, app: str, folder: Path, **settings: Any) -> Iterator[httpx.Client]:
    """The application under a route of its own; told to stop at the end, while the next test begins."""
    serve.run(build({"model": str(folder), **settings}), name=app, route_prefix=f"/{app}")
    try:
        with httpx.Client(base_url=f"{serve_url}/{app}", timeout=DEADLINE_S) as client:
            yield client
    finally:
        serve.delete(app, _blocking=False)


def complete(client: httpx.Client, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "logprobs": 0}
    response = client.post("/v1/completions", json={**body, "ignore_eos": True, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def token_names(answer: dict[str, Any]) -> list[str]:
    names: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    return names


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.1)


def executor_of(client: httpx.Client) -> dict[str, Any]:
    """What the only executor reports."""
    (executor,) = client.get("/v1/experts").json()["executors"]
    return dict(executor)


def process_of(app: str, deployment: str) -> int:
    """The process of an application's replica in this session's cluster, by the title Ray gives it."""
    title = f"ray::ServeReplica:{app}:{deployment}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cmdline").read_bytes().startswith(title) and _is_ours(entry):
                    return int(entry.name)
            except OSError:
                continue  # it ended while we looked
    raise AssertionError(f"no process {title!r}")


def _is_ours(process: Path) -> bool:
    """Whether this process is its parent, or its parent's and so on."""
    while process.name not in ("0", "1"):
        if process.name == str(os.getpid()):
            return True
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        process = process.with_name(parent)
    return False
