"""Context managers that hide transformers' progress bars and messages while a pretrained model is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hide_loading_bars() -> Iterator[None]:
    """Hide transformers' progress bars for loading and saving weights. Also works as a decorator.

    Progress bars for downloads from the hub stay visible. The previous settings are restored on exit.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    bars_enabled, downloads_hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # also hides the progress bars for downloads
    if not downloads_hidden:
        enable_progress_bars()
    try:
        yield
    finally:
        if bars_enabled:
            transformers_logging.enable_progress_bar()  # also shows the progress bars for downloads
            if downloads_hidden:
                disable_progress_bars()


@contextmanager
def hide_load_report() -> Iterator[None]:
    """Hide transformers' report of missing and unexpected weights. Also works as a decorator.

    Unused weights are normal: for example, when only the vision model is loaded from a CLIP checkpoint, the weights of
    the text model are unused. Use this function only where missing weights raise an error.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
