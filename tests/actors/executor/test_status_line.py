from actors.executor.pager import LayerCounters
from actors.executor.report import EngineReport, LayerReport
from actors.executor.status_line import StatusLine


def report(
    running: int = 0, waiting: int = 0, prompt: int = 0, generated: int = 0, **counted: int
) -> EngineReport:
    layers = tuple(LayerReport.of(layer, [], LayerCounters(**counted), None) for layer in range(2))
    return EngineReport("host", 2, 4, layers, {}, {}, running, waiting, prompt, generated)


def test_tells_rates_since_the_line_before() -> None:
    line = StatusLine(report(generated=100, hits=50), now_s=10.0)
    now = report(2, 1, prompt=40, generated=140, hits=80, misses=10, moved_bytes=3_000_000)
    assert line.next(now, now_s=12.0) == (
        "running=2 waiting=1 prompt_tokens_per_s=20.0 generated_tokens_per_s=20.0 hit_rate=0.750 moved_mb_per_s=3.0"
    )
    later = report(2, 1, prompt=40, generated=150, hits=90, misses=10, moved_bytes=3_000_000)
    assert "generated_tokens_per_s=1.0 hit_rate=1.000 moved_mb_per_s=0.0" in str(line.next(later, now_s=22.0))


def test_says_nothing_while_nothing_happens() -> None:
    line = StatusLine(report(generated=100), now_s=0.0)
    assert line.next(report(generated=100), now_s=5.0) is None
    assert line.next(report(running=1, generated=100), now_s=10.0) == (
        "running=1 waiting=0 prompt_tokens_per_s=0.0 generated_tokens_per_s=0.0 hit_rate=- moved_mb_per_s=0.0"
    ), "a request that hangs is something"
    assert line.next(report(generated=101), now_s=15.0) is not None, (
        "the last token came, then it fell silent"
    )
