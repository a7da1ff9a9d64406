"""Waits for the one answer that an engine gives to a classification."""

import threading
from collections.abc import Callable

from common.generation import GenerationChunk

WAIT_S = 120.0


class AnswerSink:
    """Args: on_answer: called on the engine's thread."""

    def __init__(self, on_answer: Callable[[], object] = lambda: None) -> None:
        self._on_answer, self._done = on_answer, threading.Event()
        self._answer: GenerationChunk | Exception | None = None

    def put(self, chunk: GenerationChunk) -> None:
        self._finish(chunk)

    def fail(self, error: Exception) -> None:
        self._finish(error)

    def result(self) -> GenerationChunk:
        """
        Raises:
            TimeoutError: the engine does not answer.
        """
        if not self._done.wait(WAIT_S):
            raise TimeoutError(f"no answer in {WAIT_S} s")
        if isinstance(self._answer, Exception):
            raise self._answer
        assert self._answer is not None
        return self._answer

    def _finish(self, answer: GenerationChunk | Exception) -> None:
        self._answer = answer
        self._done.set()
        self._on_answer()
