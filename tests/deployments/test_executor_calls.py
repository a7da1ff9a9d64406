"""Calls to executors that are not there, starting, or silent; and what a new executor asks the others."""

import asyncio
from collections.abc import AsyncIterator, Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from actors.executor.warm_up import Residents
from common.errors import UnavailableError
from common.generation import GenerationRequest, SamplingParams
from deployments import ingress, peers
from deployments.ingress import HandleBackend

GONE = DeploymentUnavailableError(DeploymentID("ExecutorDeployment"))
REQUEST = GenerationRequest("r1", (1, 2), SamplingParams(max_tokens=2))


class Call:
    """What a handle's call returns: an answer that is there, an error, or nothing for ever."""

    def __init__(self, *answers: Any) -> None:
        self.answers: asyncio.Queue[Any] = asyncio.Queue()
        for answer in answers:
            self.answers.put_nowait(answer)
        self.cancelled = False

    def remote(self, *_: Any) -> "Call":
        return self

    def cancel(self) -> None:
        self.cancelled = True

    async def _next(self) -> Any:
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __await__(self) -> Generator[Any, None, Any]:
        return self._next().__await__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        return await self._next()

    async def results_async(self, timeout_s: float, return_exceptions: bool) -> Any:
        assert return_exceptions
        return await asyncio.wait_for(self._next(), timeout_s)


class Executors:
    """A handle."""

    def __init__(self, generate: Call | None = None, check_health: Call | None = None) -> None:
        self.generate, self.check_health = generate or Call(), check_health or Call()
        self.told = Call()

    def options(self, stream: bool) -> "Executors":
        assert stream
        return self

    def broadcast(self, method: str) -> Call:
        return self.told


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "_LOOK_AGAIN_S", 0.01)
    monkeypatch.setattr(ingress, "_EXECUTOR_ANSWERS_S", 0.01)
    monkeypatch.setattr(ingress, "_EXECUTOR_STARTS_S", 0.1)


def backend(executors: Executors) -> HandleBackend:
    store: Any = SimpleNamespace(describe=Call({"total_bytes": 1}))
    handle: Any = executors
    return HandleBackend(None, handle, store)


async def generated(executors: Executors) -> list[Any]:
    return [chunk async for chunk in backend(executors).generate(REQUEST)]


async def test_a_request_does_not_wait_for_executors_that_cannot_start() -> None:
    executors = Executors(check_health=Call(GONE))
    with pytest.raises(UnavailableError, match="no executor can start"):
        await generated(executors)
    assert executors.generate.cancelled


async def test_a_request_waits_no_longer_than_executors_may_take_to_start() -> None:
    executors = Executors()
    with pytest.raises(UnavailableError, match="no executor has answered within 0.1 s"):
        await generated(executors)
    assert executors.generate.cancelled and executors.check_health.cancelled


async def test_a_request_waits_for_executors_that_are_busy_or_about_to_be_replaced() -> None:
    executors = Executors(check_health=Call(*[None, RuntimeError("it stopped")] * 20))
    waiting = asyncio.create_task(generated(executors))
    while not executors.check_health.answers.empty():  # longer than one may take to start
        await asyncio.wait({waiting}, timeout=0.01)
        assert not waiting.done()
    for answer in ("a", "b", StopAsyncIteration()):
        executors.generate.answers.put_nowait(answer)
    assert await waiting == ["a", "b"]


async def test_without_executors_there_is_a_report_all_the_same() -> None:
    executors = Executors()
    executors.told = Call(GONE, GONE)
    none = {"executors": [], "unreachable_executors": 0}
    assert await backend(executors).live_view() == none
    report = await backend(executors).expert_report()
    assert report == {"store": {"total_bytes": 1}, "predictions": {"started": 0, "failed": 0}, **none}


async def test_a_report_does_not_wait_for_an_executor_that_is_silent() -> None:
    with pytest.raises(UnavailableError, match="an executor does not answer"):
        await backend(Executors()).live_view()


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Executors:
    """The other executors, as a replica of the same deployment sees them."""
    executors = Executors()
    context = SimpleNamespace(deployment="ExecutorDeployment")
    stub = SimpleNamespace(
        get_replica_context=lambda: context, get_deployment_handle={context.deployment: executors}.get
    )
    monkeypatch.setattr(peers, "serve", stub)
    monkeypatch.setattr(peers, "_ANSWER_S", 0.01)
    return executors


async def test_a_new_executor_hears_from_those_of_its_model(others: Executors) -> None:
    same, other = Residents("mine", ((1,),)), Residents("another", ((2,),))
    others.told = Call([same, other, RuntimeError("it died meanwhile"), same])
    assert await peers.ask_peers("mine") == [same, same]


async def test_the_first_executor_hears_nothing(others: Executors, caplog: pytest.LogCaptureFixture) -> None:
    others.told = Call(GONE)
    assert await peers.ask_peers("mine") == []
    assert not caplog.records


async def test_peers_that_are_silent_are_a_warning(
    others: Executors, caplog: pytest.LogCaptureFixture
) -> None:
    assert await peers.ask_peers("mine") == []
    assert "TimeoutError" in caplog.text
