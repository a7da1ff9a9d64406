"""Shows how far loading is: a bar on a terminal, otherwise a log line for every tenth. Decides nothing."""

import logging
import sys
import time

from tqdm import tqdm

BAR_CELLS = 20
LOG_STEPS = 10


class LoadProgress:
    """Counts experts, bytes and seconds of one load. Written by one thread, may be read by others."""

    def __init__(self, num_experts: int, expert_bytes: int, logger: logging.Logger) -> None:
        self.num_experts, self.total_bytes = num_experts, num_experts * expert_bytes
        self.loaded_experts = self.loaded_bytes = 0
        self._expert_bytes, self._logger, self._logged_steps = expert_bytes, logger, 0
        self._started = time.perf_counter()
        self._stopped: float | None = None
        self._bar = _terminal_bar(self.total_bytes) if sys.stderr.isatty() else None

    @property
    def seconds(self) -> float:
        return (self._stopped or time.perf_counter()) - self._started

    @property
    def gb_per_s(self) -> float:
        return self.loaded_bytes / 1e9 / max(self.seconds, 1e-9)

    def add(self, num_experts: int) -> None:
        """Count experts that have arrived, and show it."""
        self.loaded_experts += num_experts
        self.loaded_bytes += num_experts * self._expert_bytes
        if self.loaded_experts == self.num_experts:
            self._stopped = time.perf_counter()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.loaded_experts}/{self.num_experts} experts", refresh=False)
            self._bar.update(num_experts * self._expert_bytes)
        elif self._enters_new_step():
            self._logger.info(str(self))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __str__(self) -> str:
        done = self.loaded_experts / self.num_experts
        bar = ("#" * round(done * BAR_CELLS)).ljust(BAR_CELLS)
        return (
            f"loading experts {done:4.0%} [{bar}] {self.loaded_experts}/{self.num_experts}, "
            f"{self.loaded_bytes / 1e9:.2f} of {self.total_bytes / 1e9:.2f} GB, {self.gb_per_s:.2f} GB/s"
        )

    def _enters_new_step(self) -> bool:
        step = self.loaded_experts * LOG_STEPS // self.num_experts
        entered, self._logged_steps = step > self._logged_steps, step
        return entered


def _terminal_bar(total_bytes: int) -> "tqdm[None]":
    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="loading experts")
