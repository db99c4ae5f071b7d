"""Checks for models that come with Python code, such as Jina-CLIP. The code is run only if the user allows it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def has_remote_code(path: str) -> bool:
    """Return True if loading a transformers model requires the Python code in its folder or hub repository.

    This function does not run the code. It returns False if the model does not exist or if transformers has a class for
    the model's type.
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
        raise ValueError(_not_allowed_message(path))


@contextmanager
def explain_remote_code_error(path: str) -> Iterator[None]:
    """Replace a library's error about `trust_remote_code=True` with a ValueError that names llm2clip's option."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise ValueError(_not_allowed_message(path)) from error


def _not_allowed_message(path: str) -> str:
    return (
        f"{path} comes with Python code, which is not run by default. If you trust its authors, pass "
        "--trust_remote_code (in Python: trust_remote_code=True)"
    )
