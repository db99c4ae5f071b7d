"""Progress bars in log files."""

import importlib
import re
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip import progress


def test_bar_in_a_log_file_is_one_line_per_interval(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: seconds))
    never = 1e9  # seconds; tqdm itself would redraw the bar when enough real time has passed
    with progress.ProgressBar(total=100, desc="align", unit="step", mininterval=never) as bar:
        for step in range(100):
            seconds += 1
            bar.update()
            bar.set_postfix(loss=f"{step:.1f}")
    text = capfd.readouterr().err
    assert "\r" not in text
    counts = [re.match(r"align: +\d+%\|(\d+)/100 \[.*loss=", line) for line in text.splitlines()]
    assert [match and int(match[1]) for match in counts] == list(range(10, 101, 10))


@pytest.mark.parametrize(
    ("options", "text"), [({"total": 5}, "2/5"), ({"total": 5, "disable": True}, ""), ({"leave": False}, "")]
)
def test_bar_in_a_log_file_reports_its_last_state_unless_it_is_disabled_or_transient(
    options: dict[str, Any], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress.ProgressBar(desc="part", **options) as bar:
        bar.update(2)
    output = capfd.readouterr().err
    assert text in output and bool(output) == bool(text)


def test_bars_do_not_depend_on_the_variable_that_hides_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_module = importlib.import_module("huggingface_hub.utils.tqdm")
    monkeypatch.setattr(hub_module, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with progress.ProgressBar(total=5) as bar:
        assert not bar.disable
