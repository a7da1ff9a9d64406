"""Deployments that stand behind the real ingress in cluster tests; they echo, fail and hang by the prompt's text.

Each runs in a process of its own, so that only the one that needs a tokenizer imports the library.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray.serve.handle import DeploymentHandle

from common.generation import GenerationChunk, GenerationRequest


class FakeExecutor:
    def __init__(self) -> None:
        from tests.deployments import fakes

        self.fakes = fakes
        self.running: set[str] = set()
        self.cancelled: set[str] = set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationChunk]:
        text = self.fakes.byte_tokenizer().decode(list(request.prompt_token_ids))
        self.fakes.raise_early(text)
        self.running.add(request.request_id)
        try:
            async for chunk in self.fakes.echo(request):
                yield chunk
                if text == "dies":
                    os._exit(1)
                if text == "hangs":
                    await asyncio.Event().wait()
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.add(request.request_id)
            raise
        finally:
            self.running.discard(request.request_id)

    async def expert_report(self) -> dict[str, Any]:
        return {"running": sorted(self.running), "cancelled": sorted(self.cancelled), "pid": os.getpid()}


class FakePredictor:
    """Always fails: a request does not need its prediction."""

    async def predict(self, request_id: str, token_ids: list[int]) -> None:
        raise RuntimeError(f"no prediction for {request_id} of {len(token_ids)} tokens")


class FakeStore:
    async def describe(self) -> dict[str, Any]:
        return {"model": "tiny"}


class OtherApplication:
    """Another team's Ray application: calls ours with plain dicts and reports errors as text."""

    def __init__(self, app_name: str) -> None:
        from ray import serve

        self._sida: DeploymentHandle = serve.get_app_handle(app_name)

    async def ask(self, request: dict[str, Any], method: str = "generate") -> dict[str, Any]:
        try:
            answer: dict[str, Any] = await getattr(self._sida, method).remote(request)
        except (ValueError, RuntimeError) as error:
            return {"raised": [base.__name__ for base in type(error).__mro__], "text": str(error)}
        return answer

    async def ask_streamed(self, request: dict[str, Any], method: str = "stream") -> list[dict[str, Any]]:
        return [piece async for piece in getattr(self._sida.options(stream=True), method).remote(request)]
