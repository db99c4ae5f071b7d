"""Helpers to load transformers models: configs without references to code, and context managers that hide messages.

A model folder may come from an untrusted source, and its config can name code to run: an attention implementation such
as `OWNER/NAME` is downloaded from the hub by the package `kernels`, as are the kernels of some quantisation methods.
Pass the result of `load_config` or `build_config` to every transformers model, and `WITHOUT_HUB_CODE` to every
SentenceTransformer, so that only the user can choose an implementation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from llm2clip.models.hub.model_source import check_model_source

# Arguments of `from_pretrained` that replace those saved in a sentence-transformers folder. The implementations apply
# to the configs of all parts of the model.
WITHOUT_HUB_CODE: dict[str, Any] = {
    "attn_implementation": None,
    "experts_implementation": None,
    "allow_all_kernels": False,
    "use_kernels": False,
    "kernel_config": None,
    "trust_remote_code": False,
}


def load_config(source: str | Path, **kwargs: Any) -> Any:
    """Load the config of a transformers model, without the entries that name code.

    Args:
        source: folder or hub id.
        kwargs: further arguments of `AutoConfig.from_pretrained`.

    Raises:
        ValueError: the model type is unknown to transformers, or the weights are quantised.
        OSError: the model does not exist.
    """
    from transformers import AutoConfig

    check_model_source(source)
    # By default, transformers would ask the user in the terminal if code from the folder may be run.
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False, **kwargs)
    check_not_quantized(config.to_dict(), source)
    return _remove_code_entries(config)


def build_config(architecture: dict[str, Any]) -> Any:
    """Build a transformers config from a saved dict, without the entries that name code."""
    from transformers import AutoConfig

    return _remove_code_entries(AutoConfig.for_model(**architecture))


def check_not_quantized(config: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError if the config of a model or of one of its parts says that the weights are quantised."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("quantization_config"):
            raise ValueError(
                f"{source}: the weights are quantised (quantization_config in config.json), which is not supported. "
                "Use the original weights of the model, or a .gguf file"
            )


def _remove_code_entries(config: Any) -> Any:
    config._attn_implementation = None  # the setter also applies to the configs of the model's parts
    config._experts_implementation = None
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        vars(part).pop("auto_map", None)
    return config


def read_safetensors(path: Path) -> dict[str, Any]:
    """Load a safetensors file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error})") from error


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
