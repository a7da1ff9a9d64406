"""The line that an executor logs every few seconds: what it did since the line before. Computes; does not log."""

from dataclasses import dataclass

from actors.executor.report import EngineReport


@dataclass(frozen=True)
class _Totals:
    prompt_tokens: int
    generated_tokens: int
    hits: int
    misses: int
    moved_bytes: int

    @classmethod
    def of(cls, report: EngineReport) -> "_Totals":
        return cls(
            report.prompt_tokens,
            report.generated_tokens,
            sum(layer.hits for layer in report.layers),
            sum(layer.misses for layer in report.layers),
            sum(layer.moved_bytes for layer in report.layers),
        )


class StatusLine:
    """Takes rates between two reports of one engine.

    Args:
        report: as of `now_s`, monotonic seconds; rates count from there.
    """

    def __init__(self, report: EngineReport, now_s: float) -> None:
        self._before, self._before_s = _Totals.of(report), now_s

    def next(self, report: EngineReport, now_s: float) -> str | None:
        """What happened since the call before, in key=value form; None when nothing did and nothing runs or waits."""
        before, elapsed_s = self._before, now_s - self._before_s
        self._before, self._before_s = now, _ = _Totals.of(report), now_s
        if now == before and not (report.num_running or report.num_waiting):
            return None
        needed = now.hits + now.misses - before.hits - before.misses
        hit_rate = f"{(now.hits - before.hits) / needed:.3f}" if needed else "-"
        return (
            f"running={report.num_running} waiting={report.num_waiting} "
            f"prompt_tokens_per_s={(now.prompt_tokens - before.prompt_tokens) / elapsed_s:.1f} "
            f"generated_tokens_per_s={(now.generated_tokens - before.generated_tokens) / elapsed_s:.1f} "
            f"hit_rate={hit_rate} "
            f"moved_mb_per_s={(now.moved_bytes - before.moved_bytes) / elapsed_s / 1e6:.1f}"
        )
