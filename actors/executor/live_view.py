"""What happens to every expert, as the live page draws it: one character per expert, and totals to take rates from.

Not for bookkeeping: `report.py` has the counters. One thread uses a view.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.executor.pager import ABSENT, Activity
from actors.executor.report import EngineReport

PERIOD_S = 0.4  # of the answers, however many ask: a page asks twice a second

# What an expert did since the look before.
ABSENT_MARK, RESIDENT_MARK = ".", "o"  # not needed
UNUSED_MARK = "p"  # resident, prefetched, and not needed yet
# Needed: in its slot each time (h), in between (by fifths), or missed each time (m). Who pages on a device counts no
# misses of single experts: there m has been copied into the slot that it has now, or had, and h was in its slot before.
NEEDED_MARKS = "hijklm"
_MARKS = np.frombuffer((ABSENT_MARK + RESIDENT_MARK + UNUSED_MARK + NEEDED_MARKS).encode(), np.uint8)
_FIRST_NEEDED = len(_MARKS) - len(NEEDED_MARKS)


class LiveView:
    """Compares what a pager shows with what it showed at the last look.

    Args:
        activity: of a pager.
        report: of the engine.
    """

    def __init__(self, activity: Callable[[], Activity], report: Callable[[], EngineReport]) -> None:
        self._activity, self._report = activity, report
        self._seen = activity()
        self._answer: dict[str, Any] | None = None

    def look(self) -> dict[str, Any]:
        """What happened in the last period, as JSON; the same answer for everybody who asks within PERIOD_S."""
        now_s = time.monotonic()
        if self._answer is None or now_s - self._answer["time_s"] >= PERIOD_S:
            before, self._seen = self._seen, self._activity()
            self._answer = {"time_s": now_s, **_totals(self._report()), "experts": _draw(before, self._seen)}
        return self._answer


def _totals(report: EngineReport) -> dict[str, int]:
    return {
        "num_running": report.num_running,
        "num_waiting": report.num_waiting,
        "prompt_tokens": report.prompt_tokens,
        "generated_tokens": report.generated_tokens,
        "hits": sum(layer.hits for layer in report.layers),
        "misses": sum(layer.misses for layer in report.layers),
        "moved_bytes": sum(layer.moved_bytes for layer in report.layers),
    }


def _draw(before: Activity, now: Activity) -> list[str]:
    """Per layer, a mark for each expert."""
    resident = now.slot_of != ABSENT
    uses = np.maximum(now.uses - before.uses, 0)  # [layers, experts]
    if now.misses is not None and before.misses is not None:
        missed_share = (now.misses - before.misses) / np.maximum(uses, 1)
    else:
        missed_share = 1.0 - (resident & (now.slot_of == before.slot_of))
    needed = _FIRST_NEEDED + np.rint(missed_share * (len(NEEDED_MARKS) - 1)).astype(np.int64)
    idle = np.where(resident, np.where(now.unused, 2, 1), 0)
    drawn = _MARKS[np.where(uses > 0, needed, idle)]
    return [row.tobytes().decode("ascii") for row in drawn]
