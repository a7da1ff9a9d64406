"""Switches prefetching off, layer by layer, where what it brought so far did not pay for what it copied in vain."""

import numpy as np
from numpy.typing import NDArray

_MIN_SAMPLE = 32  # prefetched experts of a layer before it is judged
_PROBE_EVERY = 40  # reviews after which a layer that was switched off gets another chance
_LEAST_PRECISION = 0.1  # below which it is switched off even where copies cost no time


def break_even_precision(copy_s: float, window_s: float) -> float:
    """The share of prefetched experts that must turn out to be needed.

    A right guess saves the part of its copy that runs beside the compute; a wrong one delays the layer by the rest.

    Args:
        copy_s: of one expert. window_s: the compute of one layer, which a copy can run beside.
    """
    return max(_LEAST_PRECISION, 1.0 - window_s / copy_s)


def affordable_prefetches(copy_s: float, window_s: float, most: int) -> int:
    """How many copies fit beside the compute of one layer, at least one: what exceeds the window delays the layer."""
    return min(most, max(1, round(window_s / copy_s)))


class PrefetchGovernor:
    """
    Args:
        most: experts a layer may prefetch per step while it is switched on.
    """

    def __init__(self, num_layers: int, break_even: float, most: int) -> None:
        self.break_even, self.most = break_even, most
        self._reviews_off = np.zeros(num_layers, np.int64)  # 0: switched on
        # [2, layers] prefetched and used, up to the last judgement; what was before the first review is not judged.
        self._judged: NDArray[np.int64] | None = None

    def review(self, prefetched: NDArray[np.int64], used: NDArray[np.int64]) -> NDArray[np.int32]:
        """Judge every layer with enough new experience.

        Args:
            prefetched, used: [layers], counted since start.
        Returns:
            [layers] the experts each may prefetch per step from now on.
        """
        counted = np.stack([prefetched, used])
        if self._judged is None:
            self._judged = counted
        new = counted - self._judged
        has_sample = new[0] >= _MIN_SAMPLE
        fails = has_sample & (new[1] < self.break_even * new[0])
        self._judged = np.where(has_sample, counted, self._judged)
        waited = np.where(self._reviews_off > 0, self._reviews_off + 1, 0) % (_PROBE_EVERY + 1)
        self._reviews_off = np.where(fails, 1, waited)
        return np.where(self._reviews_off > 0, 0, self.most).astype(np.int32)
