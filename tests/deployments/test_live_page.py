"""The live page in a real browser, against the real routes over two executors that are not real."""

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from deployments.completions import CompletionService
from deployments.http_api import create_http_api
from deployments.observation_routes import LIVE_PAGE
from deployments.prompts import PromptReader
from tests.deployments.fakes import VOCAB_SIZE, byte_tokenizer
from tests.deployments.two_executors import NUM_EXPERTS, NUM_LAYERS, TwoExecutors

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)"
)
DEADLINE_S = 60.0


@contextmanager
def serving(backend: TwoExecutors, api_key: str | None = None) -> Iterator[str]:
    service = CompletionService("tiny", PromptReader(byte_tokenizer(), VOCAB_SIZE, 100), backend)
    config = uvicorn.Config(create_http_api(service, api_key), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + DEADLINE_S
        while not server.started:
            assert time.monotonic() < end and thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)


def dom_of(url: str, profile: Path) -> str:
    """The page's elements after four of its seconds."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", "--virtual-time-budget=4000", "--dump-dom", url,
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    return run.stdout


def text_of(dom: str, tag: str, identity: str) -> str:
    (text,) = re.findall(rf"<{tag}[^>]*{identity}[^>]*>(.*?)</{tag}>", dom, re.DOTALL)
    return str(text)


@needs_chromium
def test_draws_every_expert_of_every_executor(tmp_path: Path) -> None:
    backend = TwoExecutors()
    with serving(backend) as url:
        dom = dom_of(url, tmp_path)
    assert backend.num_looks > 3, "it asks again and again"
    assert re.findall(r'data-cells="(\d+)"', dom) == [str(NUM_LAYERS * NUM_EXPERTS)] * 2
    assert re.findall(r"<h2>Executor (\w+) ?</h2>", dom) == ["first", "second"]
    assert text_of(dom, "span", 'id="status"') == "2 executors, 1 not answering"
    marks = dict(re.findall(r'<li data-mark="(\w+)">.*?: (\d+)</li>', dom))
    assert marks == {"hit": "2", "miss": "4", "unused": "2", "resident": "4", "absent": "4"}
    assert dom.count("hit rate 75.0 %") == 2


@needs_chromium
def test_curves_show_rates_of_all_executors(tmp_path: Path) -> None:
    with serving(TwoExecutors()) as url:
        dom = dom_of(url, tmp_path)
    shown = {
        id_: text_of(dom, "section", f'id="{id_}"') for id_ in ("tokens", "hit_rate", "requests", "moved")
    }
    assert re.search(r"<output>75\.0 %</output>", shown["hit_rate"])
    assert re.search(r"<output>6, 3 </output>", shown["requests"])
    for name, unit in (("tokens", "/s"), ("moved", "MB/s")):
        (rate,) = re.findall(rf"<output>([\d.]+) {unit}</output>", shown[name])
        assert float(rate) > 0


@needs_chromium
def test_asks_for_the_key(tmp_path: Path) -> None:
    with serving(TwoExecutors(), api_key="s3cret") as url:
        assert httpx.get(url).status_code == 200, "the page itself is no secret"
        dom = dom_of(url, tmp_path)
    assert text_of(dom, "span", 'id="status"') == "locked"
    assert re.search(r'<form id="key">', dom), "not hidden any more"
    assert "data-cells" not in dom


def test_the_page_needs_no_other_host() -> None:
    assert not re.findall(r"(?:https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", LIVE_PAGE.read_text(), flags=re.M))
