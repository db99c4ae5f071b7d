"""Helpers to load models without running code from a model folder, and without irrelevant messages.

A model folder may come from an untrusted source. It can contain Python code, as Jina-CLIP does, and its config can name
code on the hub: the package `kernels` downloads and runs attention implementations with names such as `OWNER/NAME`, and
the kernels of some quantisation methods. Pass the result of `load_config` or `build_config` to every transformers
model, and `WITHOUT_HUB_CODE` to every SentenceTransformer, so that only the user can choose an implementation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from llm2clip.models.hub.model_names import check_model_source

# Arguments of `from_pretrained` that override the arguments saved in a sentence-transformers folder. They apply to the
# configs of all parts of the model.
WITHOUT_HUB_CODE: dict[str, Any] = {
    "attn_implementation": None,
    "experts_implementation": None,
    "allow_all_kernels": False,
    "use_kernels": False,
    "kernel_config": None,
    "trust_remote_code": False,
}


def load_config(source: str | Path, **kwargs: Any) -> Any:
    """Load the config of a transformers model, without the entries that name code to run.

    Args:
        source: folder or hub id.
        kwargs: further arguments of `AutoConfig.from_pretrained`.

    Raises:
        ValueError: the model type is unknown to transformers, or the weights are quantised.
        OSError: the model does not exist.
    """
    from transformers import AutoConfig

    check_model_source(source)
    # By default, transformers would ask in the terminal whether to run code from the folder.
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False, **kwargs)
    check_not_quantized(config.to_dict(), source)
    return _remove_code_entries(config)


def build_config(architecture: dict[str, Any]) -> Any:
    """Build a transformers config from a saved dict, without the entries that name code to run."""
    from transformers import AutoConfig

    return _remove_code_entries(AutoConfig.for_model(**architecture))


def check_not_quantized(config: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError if the weights of a model or of one of its parts are quantised, according to the config."""
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

    Unexpected weights are normal: for example, loading only the vision model from a CLIP checkpoint leaves the text
    model's weights unused. Use this function only where missing weights raise an error.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def has_remote_code(path: str) -> bool:
    """Return True if loading a transformers model requires the Python code in its folder or hub repository.

    The code is not run. The result is False if the model does not exist or if transformers has a class for the model's
    type.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):  # not a transformers model; the loading function will report the error
        return False
    code_classes = config.get("auto_map") or {}
    return "AutoModel" in code_classes and config.get("model_type") not in CONFIG_MAPPING


def check_remote_code_is_allowed(path: str, trust_remote_code: bool) -> None:
    """Raise ValueError if a transformers model comes with Python code that the user has not allowed to run."""
    if not trust_remote_code and has_remote_code(path):
        raise ValueError(_format_not_allowed_message(path))


@contextmanager
def explain_remote_code_error(path: str) -> Iterator[None]:
    """Replace a library's error about `trust_remote_code=True` with a ValueError that names llm2clip's flag."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(_format_not_allowed_message(path)) from error


def _format_not_allowed_message(path: str) -> str:
    return (
        f"{path} comes with Python code, which is not run by default. If you trust its authors, pass "
        "--trust_remote_code (in Python: trust_remote_code=True)"
    )
