"""The application as a user starts it, `python -m deployments`, in a process of its own; and its end, whatever happened."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.gpu.processes import Process, family

POLL_S = 0.5
STOP_S = 60.0
LOG_TAIL_LINES = 40

# Where memory is plugged in as it is used, Ray reads too little of it: it would refuse to start beside a large object
# store, or end processes of a machine that has memory left.
_RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_OVERRIDE_RESOURCES": json.dumps({"memory": 10**9}),
}


class Application:
    """A context manager: ready inside, and none of its processes left after it.

    Args:
        settings: of the configuration.
        object_store_gb: of Ray, which starts for this application alone.
        log: file that gets what the application prints.
        deadline_s: for its start.
    Raises:
        RuntimeError: it ended, or was not ready in time; the message has the end of its log.
    """

    def __init__(
        self, settings: Mapping[str, Any], object_store_gb: float, log: Path, deadline_s: float = 300.0
    ) -> None:
        self._settings, self._object_store_gb = dict(settings), object_store_gb
        self._log, self._deadline_s = log, deadline_s
        self._num_executors = int(self._settings.get("min_executors", 1))
        self.url = f"http://127.0.0.1:{_free_port()}"
        self.ready_s = 0.0  # how long the start took
        self._seen: dict[tuple[int, int], Process] = {}  # every process of it so far, by number and start

    def __enter__(self) -> Self:
        port = self.url.rpartition(":")[2]
        store = ["--object-store-gb", str(self._object_store_gb)]
        settings = [f"{key}={value}" for key, value in self._settings.items()]
        command = [sys.executable, "-m", "deployments", "--port", port, *store, *settings]
        started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **_RAY_ENVIRONMENT}
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.perf_counter() - started
        return self

    def __exit__(self, *_: TracebackType | BaseException | type[BaseException] | None) -> None:
        self.stop()

    @property
    def model(self) -> str:
        """The model's name in the API."""
        return str(self.get("/v1/models")["data"][0]["id"])

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            body: dict[str, Any] = json.load(response)
        return body

    def processes(self) -> list[Process]:
        """All of its processes, Ray's included."""
        processes = family(self._process.pid)
        self._seen.update({(process.pid, process.started): process for process in processes})
        return processes

    def stop(self) -> None:
        """Ask it to end, then end what is left of it. Twice is fine."""
        self.processes()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.processes()
                self._process.kill()
                self._process.wait()
        self._wait_for_end(POLL_S * 10)
        for process in self._left():
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, signal.SIGKILL)
        self._wait_for_end(STOP_S)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._deadline_s
        while not self._is_ready():
            self.processes()
            if self._process.poll() is not None:
                raise RuntimeError(
                    f"the application ended with status {self._process.returncode}:\n{self._tail()}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(f"the application was not ready in {self._deadline_s} s:\n{self._tail()}")
            time.sleep(POLL_S)

    def _is_ready(self) -> bool:
        try:
            report = self.get("/v1/experts")
        except OSError:  # refused, or an HTTP status of somebody who is not there yet
            return False
        store = report["store"] or {"state": "does not answer"}
        return store["state"] == "ready" and len(report["executors"]) == self._num_executors

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def _left(self) -> list[Process]:
        return [process for process in self._seen.values() if process.is_alive()]

    def _wait_for_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self._left() and time.monotonic() < deadline:
            time.sleep(0.1)


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C does, so that what it has started ends with it."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
