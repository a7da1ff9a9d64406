"""LoadProgress: a line per tenth when nobody watches, and true numbers at the end."""

import logging

import pytest

from actors.expert_store.progress import LoadProgress

logger = logging.getLogger("test-progress")


def test_logs_a_line_for_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=logger.name)
    progress = LoadProgress(num_experts=1000, expert_bytes=10**6, logger=logger)
    for _ in range(1000):
        progress.add(1)
    assert [record.getMessage().split()[2] for record in caplog.records] == [
        f"{n}%" for n in range(10, 101, 10)
    ]
    assert "1000/1000, 1.00 of 1.00 GB" in caplog.records[-1].getMessage()


def test_large_steps_log_once_each(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=logger.name)
    progress = LoadProgress(num_experts=4, expert_bytes=1, logger=logger)
    progress.add(3)
    progress.add(1)
    assert len(caplog.records) == 2


def test_time_stands_still_when_all_is_loaded() -> None:
    progress = LoadProgress(num_experts=2, expert_bytes=10**9, logger=logger)
    progress.add(2)
    first_look = progress.seconds
    assert progress.seconds == first_look
    assert progress.gb_per_s == pytest.approx(2 / progress.seconds)


def test_shows_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = LoadProgress(num_experts=2, expert_bytes=10**9, logger=logger)
    progress.add(1)
    progress.close()
    assert "loading experts" in capsys.readouterr().err
