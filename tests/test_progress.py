"""Progress bars in log files."""

from __future__ import annotations

import re

import pytest

from llm2clip import progress


def test_bar_in_a_log_file_is_one_line_per_interval(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))  # one second per reading
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.ProgressBar(total=100, desc="align", unit="step") as bar:
        for step in range(100):
            bar.update()
            bar.set_postfix(loss=f"{step:.1f}")
    text = capfd.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert 3 <= len(lines) <= 30
    assert all(re.match(r"align: +\d+%\|\d+/100 \[", line) for line in lines)
    assert "100/100" in lines[-1]


def test_bar_in_a_log_file_reports_its_last_state_when_closed_early(capfd: pytest.CaptureFixture[str]) -> None:
    bar = progress.ProgressBar(total=5, desc="part")
    bar.update(2)
    bar.close()
    assert "2/5" in capfd.readouterr().err


def test_disabled_and_transient_bars_print_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.ProgressBar(total=5, disable=True) as bar:
        bar.update(5)
    with progress.ProgressBar(desc="read", leave=False) as bar:
        bar.update(5)
    assert capfd.readouterr().err == ""
