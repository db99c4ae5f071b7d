"""Progress bars for terminals, notebooks and log files."""

import sys
import time
from typing import Any

from huggingface_hub.utils import tqdm

LOG_INTERVAL = 10.0  # seconds between lines in a log file


class ProgressBar(tqdm):
    """tqdm progress bar that writes a new line every few seconds if the output is a log file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writes_lines = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        self._last_line_time = time.monotonic()
        self._last_line = ""
        super(tqdm, self).__init__(*args, **kwargs)  # bypasses HF_HUB_DISABLE_PROGRESS_BARS, which is for downloads
        if self._writes_lines and not self.disable and self.total is not None:
            self.bar_format = "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"

    def display(self, msg: str | None = None, pos: int | None = None, **kwargs: Any) -> Any:
        """Redraw the bar in place. In a log file, write a new line at most every `LOG_INTERVAL` seconds."""
        if not self._writes_lines:
            return super().display(msg, pos, **kwargs)
        is_complete = self.total is not None and self.n >= self.total
        is_due = time.monotonic() - self._last_line_time >= LOG_INTERVAL
        line = (msg if msg is not None else str(self)).strip()
        if (is_complete or is_due) and line and line != self._last_line:
            self._write_log_line(line)
        return True

    def close(self) -> None:
        if not self._writes_lines:
            return super().close()
        if self.disable:
            return None
        self.disable = True
        line = str(self).strip()
        already_written = self._last_line.startswith(line.split("[")[0])  # ignores the elapsed time
        if self.leave and self.n and not already_written:
            self._write_log_line(line)
        type(self)._decr_instances(self)  # type: ignore[attr-defined]
        return None

    def moveto(self, n: int) -> None:
        if not self._writes_lines:
            super().moveto(n)

    def clear(self, *args: Any, **kwargs: Any) -> None:
        if not self._writes_lines:
            super().clear(*args, **kwargs)

    def _write_log_line(self, line: str) -> None:
        self.fp.write(line + "\n")
        self.fp.flush()
        self._last_line = line
        self._last_line_time = time.monotonic()
