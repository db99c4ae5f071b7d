"""Loading of pretrained models without the progress bars of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_loading_bars() -> Iterator[None]:
    """Hide transformers' progress bars for loading and saving weights; also works as a decorator.

    Bars of downloads from the hub stay visible. The previous settings are restored at the end.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    bars_enabled, downloads_hidden = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.disable_progress_bar()  # also hides downloads
    if not downloads_hidden:
        enable_progress_bars()
    try:
        yield
    finally:
        if bars_enabled:
            logging.enable_progress_bar()  # also shows downloads
            if downloads_hidden:
                disable_progress_bars()
