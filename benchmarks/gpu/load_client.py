"""One process of load: streams of completions through the openai client. Jobs come in as lines of JSON, answers go out.

Several of them load a server together, so that reading its events is not what is measured. `LoadClients` is the other
end of the pipes. Imports no torch.

    python -m benchmarks.gpu.load_client http://127.0.0.1:8000/v1 MODEL
"""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from openai import AsyncOpenAI

from benchmarks.gpu.closed_loop import Answer, Plan, share_out

TIMEOUT_S = 600.0  # of one request
START_DELAY_S = 0.2  # from the sending of jobs until all begin
END_S = 10.0


class LoadClients:
    """Client processes under one roof; a context manager.

    Args:
        base_url: of the API, with its /v1.
    """

    def __init__(self, base_url: str, model: str, num_processes: int) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.load_client", base_url, model]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(num_processes)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: TracebackType | BaseException | type[BaseException] | None) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()  # the end of its jobs
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, plan: Plan, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
        """Run a plan's streams, dealt to the processes.

        Raises:
            RuntimeError: a process has ended.
        """
        parts = share_out(plan, len(self._processes))
        start_at_s = time.perf_counter() + START_DELAY_S
        for process, part in zip(self._processes, parts, strict=False):
            assert process.stdin is not None
            job = {"plan": part, "prompts": prompts, "new_tokens": new_tokens, "start_at_s": start_at_s}
            print(json.dumps(job), file=process.stdin, flush=True)
        return [answer for process in self._processes[: len(parts)] for answer in _read_answers(process)]


def _read_answers(process: "subprocess.Popen[str]") -> list[Answer]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"a load client ended with status {process.wait()}")
    return [Answer(**answer) for answer in json.loads(line)]


async def run_job(client: AsyncOpenAI, model: str, job: dict[str, Any]) -> list[Answer]:
    await asyncio.sleep(job["start_at_s"] - time.perf_counter())

    async def stream(numbers: Sequence[int]) -> list[Answer]:
        return [
            await complete(client, model, number, job["prompts"][number], job["new_tokens"])
            for number in numbers
        ]

    streams = await asyncio.gather(*(stream(numbers) for numbers in job["plan"]))
    return [answer for answers in streams for answer in answers]


async def complete(
    client: AsyncOpenAI, model: str, number: int, prompt: list[int], new_tokens: int
) -> Answer:
    """One streamed completion, greedy. What goes wrong becomes the answer's error."""
    answer = Answer(number, time.perf_counter())
    texts = []
    try:
        events = await client.completions.create(
            model=model, prompt=prompt, max_tokens=new_tokens, temperature=0, stream=True,
            stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for event in events:
            if event.choices:
                answer.arrivals_s.append(time.perf_counter())
                texts.append(event.choices[0].text)
            if event.usage is not None:
                answer.completion_tokens = event.usage.completion_tokens
                answer.experts = (event.usage.model_extra or {}).get("experts", {})
    except Exception as error:  # of the server, the client or the network: reported with the figures
        answer.error = f"{type(error).__name__}: {error}"
    answer.text = "".join(texts)
    return answer


async def main() -> None:
    base_url, model = sys.argv[1:]
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        while line := await asyncio.to_thread(sys.stdin.readline):
            answers = await run_job(client, model, json.loads(line))
            print(json.dumps([asdict(answer) for answer in answers]), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
