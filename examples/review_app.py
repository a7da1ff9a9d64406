"""Another Ray Serve application that asks sida-serve to go on with a snippet of code, whole and streamed.

Not part of the server, and it imports nothing of it: requests and answers are plain dicts. With an application named
"sida" running on the cluster (`make serve`):

    serve run --name review --route-prefix /review examples.review_app:build
    curl http://127.0.0.1:8000/review --data 'def fibonacci(n):'
    curl -N 'http://127.0.0.1:8000/review?stream' --data 'def fibonacci(n):'
"""

from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse


class Reviewer:
    """Takes a snippet as the body of a POST and answers with how it might go on."""

    def __init__(self, app_name: str, max_tokens: int) -> None:
        # The handle leads to the ingress of the other application, wherever on the cluster its replicas are.
        self._sida = serve.get_app_handle(app_name)
        # The fields of POST /v1/completions; for messages there are `chat` and `stream_chat` beside `generate`
        # and `stream`.
        self._fields = {"max_tokens": max_tokens, "temperature": 0}

    async def __call__(self, request: Request) -> Response:
        snippet = (await request.body()).decode()
        if "stream" in request.query_params:
            return StreamingResponse(self.stream(snippet), media_type="text/plain")
        try:
            return PlainTextResponse(await self.complete(snippet))
        except ValueError as error:
            # The request is at fault; a RuntimeError would mean the server. Ray's exception shows a traceback, and
            # its cause, which is what was raised, OpenAI's error body.
            body = str(getattr(error, "cause", error))
            return Response(body, status_code=400, media_type="application/json")

    async def complete(self, snippet: str) -> str:
        """The whole completion, once it is there."""
        answer = await self._sida.generate.remote({"prompt": snippet, **self._fields})
        text: str = answer["choices"][0]["text"]
        return text

    async def stream(self, snippet: str) -> AsyncIterator[str]:
        """The completion in pieces. Leaving the loop early cancels the request and frees its place in the batch."""
        request = {"prompt": snippet, **self._fields}
        async for piece in self._sida.options(stream=True).stream.remote(request):
            yield piece["choices"][0]["text"]


def build(args: dict[str, Any]) -> Application:
    """
    Args:
        args: `app`, the name of the sida-serve application (default sida), and `max_tokens` (default 64).
    """
    deployment = serve.deployment(Reviewer).options(ray_actor_options={"num_cpus": 0.1})
    return deployment.bind(args.get("app", "sida"), int(args.get("max_tokens", 64)))
