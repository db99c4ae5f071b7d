"""Helpers for loading models by name: hub access, safe configs, hashes and error messages.

If a user mistypes a path, libraries look for the path on the hub, and retry for a minute if the machine is offline.
Therefore, call `check_model_source` before passing a name to a library.

A model folder from an untrusted source can contain Python code. Its config can also name code on the hub, which
transformers would download and run: attention implementations of the form `OWNER/NAME`, and kernels for quantised
weights. To prevent such downloads, pass the result of `load_transformers_config` or `build_transformers_config` to
every transformers model, and `WITHOUT_HUB_CODE` to every SentenceTransformer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.io_utils import describe_error, hide_url_secrets, read_json, read_json_object

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llm2clip.models.precision import Precision

# Default model of `llm2clip index` (MIT licence), its revision, and the files that transformers needs.
DEFAULT_MODEL = "openai/clip-vit-base-patch32"
DEFAULT_REVISION = "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
DEFAULT_FILES = (
    *("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
    *("merges.txt", "special_tokens_map.json", "pytorch_model.bin"),
)
HUB_TIMEOUT = 5  # seconds per request to the hub
MAX_TEXT_GROWTH = 1000  # maximum ratio of a text's length after tokenizer normalisation to its original length
# HTTP status, hub error code, exception type or errno -> explanation and advice.
_HUB_ERRORS: dict[Any, str] = {
    **dict.fromkeys((401, 403, 404), "{access_problem}: run `hf auth login` or set HF_TOKEN"),
    412: "another push changed the repository: check the new files, then push again to replace them",
    429: "the hub received too many requests: try again in a few minutes",
    "GatedRepo": "the model is gated: accept its terms on the hub, then run `hf auth login` or set HF_TOKEN",
    "RevisionNotFound": "the revision does not exist: pass a branch, a tag or a full commit hash",
    json.JSONDecodeError: "the hub's response is not valid JSON: check for a proxy or login page",
    errno.ENOSPC: "no space left on the disk: free up some space, or set HF_HOME to a folder on another disk",
}
_HUB_ID = re.compile(r"[a-z0-9][\w.-]*/[a-z0-9][\w.-]*", re.ASCII | re.IGNORECASE)
_FILE_SUFFIXES = (
    *(".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".gguf", ".onnx", ".npz", ".npy", ".pkl"),
    *(".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".zip", ".tar", ".gz"),
)
# transformers config entries to ignore when configs are compared. is_causal is a separate entry of encoder identities.
ENTRIES_WITHOUT_EFFECT = (
    *("_name_or_path", "transformers_version", "architectures", "id2label", "label2id"),
    *("dtype", "torch_dtype", "use_cache", "is_causal"),
)
# `from_pretrained` arguments that prevent a sentence-transformers folder from loading code from the hub.
WITHOUT_HUB_CODE: dict[str, Any] = {
    "attn_implementation": None,
    "experts_implementation": None,
    "allow_all_kernels": False,
    "use_kernels": False,
    "kernel_config": None,
    "trust_remote_code": False,
}


# ---- model names ----------------------------------------------------------------------------------------------------


def is_hub_id(name: str) -> bool:
    """Return True if `name` has the form OWNER/NAME and does not end with the suffix of a weight file or data file."""
    return _HUB_ID.fullmatch(name) is not None and not name.lower().endswith(_FILE_SUFFIXES)


def split_revision(name: str) -> tuple[str, str | None]:
    """Split OWNER/NAME@REVISION into a hub id and a revision. Return other names unchanged, with the revision None."""
    hub_id, _, revision = name.partition("@")
    return (hub_id, revision) if revision and is_hub_id(hub_id) and not Path(name).exists() else (name, None)


def check_model_source(source: str | Path) -> None:
    """Raise FileNotFoundError if `source` is neither a local path nor a hub id that is cached or can be looked up.

    If the hub cannot be reached, switch huggingface_hub to offline mode to prevent retries.
    """
    from huggingface_hub import constants

    name = str(source)
    if Path(name).exists():
        return
    if not is_hub_id(name):
        raise FileNotFoundError(f"{name} is neither an existing path nor a hub id (OWNER/NAME)")
    problem = find_hub_problem()
    if problem and not (Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}").is_dir():
        raise FileNotFoundError(f"{name} is neither a local path nor a model in the hub's cache, and {problem}")


@lru_cache(maxsize=1)
def find_hub_problem() -> str:
    """Return why the hub cannot be used, or "" if it can. The check runs only once per process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is disabled in offline mode (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # the exception type depends on huggingface_hub's HTTP library
        constants.HF_HUB_OFFLINE = True
        return f"the hub cannot be reached ({constants.ENDPOINT}: {error})"
    return ""


def get_display_names(models: Sequence[str]) -> list[str]:
    """Return a short, unique name for each model.

    The name of an existing path is its last component. For RUN/model and RUN/encoder, the name is the last component of
    RUN. If two names would be equal, no name is shortened. Repetitions of a model are numbered, as in "NAME (2)".
    """
    names = [_shorten_name(model) for model in models]
    if len(set(names)) < len(names):
        names = list(models)
    repetitions = [names[:n].count(name) for n, name in enumerate(names)]
    return [f"{name} ({n + 1})" if n else name for name, n in zip(names, repetitions, strict=True)]


def _shorten_name(model: str) -> str:
    path = Path(model)
    if not path.exists():
        return model
    folder = path.resolve()
    name = folder.parent.name if path.name in ("model", "encoder") else folder.name
    return name or model


# ---- configs and weights --------------------------------------------------------------------------------------------


def load_transformers_config(source: str | Path, **kwargs: Any) -> Any:
    """Load a transformers model's config from a folder or the hub, and remove entries that name code to run.

    Raise ValueError if transformers does not support the model type, or if the weights are quantised.
    """
    from transformers import AutoConfig

    check_model_source(source)
    # Without trust_remote_code=False, transformers would ask the user whether to run code from the folder.
    config = AutoConfig.from_pretrained(str(source), trust_remote_code=False, **kwargs)
    check_not_quantized(config.to_dict(), source)
    return _remove_code_entries(config)


def build_transformers_config(architecture: dict[str, Any]) -> Any:
    """Build a transformers config from a dict, and remove entries that name code to run."""
    from transformers import AutoConfig

    return _remove_code_entries(AutoConfig.for_model(**architecture))


def check_not_quantized(config: dict[str, Any], source: str | Path) -> None:
    """Raise ValueError if a config specifies quantised weights for a model or any of its parts."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        if part.get("quantization_config"):
            raise ValueError(
                f"{source} has quantised weights (quantization_config in config.json), which are not supported. Use "
                "the model's original weights or a .gguf file"
            )


def select_output_entries(config: Any) -> dict[str, Any]:
    """Return the entries of a transformers config that can affect the model's output.

    Entries that are None, False, 0 or empty are omitted, because new transformers releases add such entries.
    """
    return {name: value for name, value in config.to_dict().items() if value and name not in ENTRIES_WITHOUT_EFFECT}


def _remove_code_entries(config: Any) -> Any:
    config._attn_implementation = None  # the setter also updates the configs of the model's parts
    config._experts_implementation = None
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        vars(part).pop("auto_map", None)
    return config


def find_model_file(source: str | Path, name: str, subfolder: str = "") -> Path | None:
    """Return the path of a file in a folder or hub repository, or None if the file is missing. Download hub files."""
    from transformers.utils import cached_file

    if Path(source).is_file():
        return None
    try:
        check_model_source(source)
        file = cached_file(
            str(source),
            name,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:  # `source` is neither a folder nor a hub id, or the hub cannot be reached
        return None
    return None if file is None else Path(file)


def download_hub_snapshot(hub_id: str, patterns: Sequence[str], **options: Any) -> Path:
    """Download the files of OWNER/NAME[@REVISION] that match the glob patterns. Return the local folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    name, revision = split_revision(hub_id)
    check_model_source(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **{"revision": revision, **options}))
    except (HTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(f"{hub_id} cannot be downloaded from the hub: {describe_hub_error(error)}") from error


def describe_hub_error(error: BaseException, access_problem: str = "it does not exist, or you lack access") -> str:
    """Return an error message that explains an exception from huggingface_hub and suggests a solution."""
    from huggingface_hub.errors import HTTPError

    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    response: Any = next((r for cause in causes if (r := getattr(cause, "response", None)) is not None), None)
    status, headers = getattr(response, "status_code", 0), getattr(response, "headers", {})
    hub_message = next((m for cause in causes if (m := getattr(cause, "server_message", None))), "")
    message = " ".join(hub_message.split())[:300] or describe_error(causes[-1]).partition("\n")[0].rstrip(".")
    keys = (type(causes[-1]), getattr(causes[-1], "errno", None), headers.get("X-Error-Code"), status)
    meaning = next((_HUB_ERRORS[key] for key in keys if key in _HUB_ERRORS), None)
    if meaning and not (status == 403 and re.search("limit|quota", message)):
        message = f"{meaning.format(access_problem=access_problem)} (details: {message})"
    network_errors = (HTTPError, ConnectionError, TimeoutError, RuntimeError)  # RuntimeError: from hf_xet
    if status >= 500 or (not status and any(isinstance(cause, network_errors) for cause in causes)):
        message += ". Try again: complete files are not downloaded again"
    return hide_url_secrets(message)  # presigned URLs contain credentials


def read_config(source: str | Path, subfolder: str = "") -> dict[str, Any]:
    """Return the contents of config.json in a folder or hub repository, or an empty dict if the file is missing."""
    file = find_model_file(source, "config.json", subfolder)
    return {} if file is None else dict(read_json(file))


def read_safetensors(path: Path) -> dict[str, Any]:
    """Load a safetensors file. Raise ValueError if the file is corrupt."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is corrupt or incomplete ({error})") from error


@contextmanager
def explain_load_errors(source: str | Path) -> Iterator[None]:
    """Convert a library's unexpected exception, such as a KeyError, to a ValueError that names the model."""
    import torch

    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{source} cannot be loaded ({describe_error(error)}). Check its config.json, or download the model again"
        ) from error


def check_tokenizer_normalizer(source: str | Path, subfolder: str = "") -> None:
    """Raise ValueError if the tokenizer's normaliser can lengthen a text by more than a factor of MAX_TEXT_GROWTH.

    The tokenizers library aborts the process if the normalised text does not fit in memory.
    """
    file = find_model_file(source, "tokenizer.json", subfolder)
    growth = 1 if file is None else _compute_text_growth(read_json_object(file).get("normalizer"))
    if growth > MAX_TEXT_GROWTH:
        raise ValueError(f"{file}: the normalizer can lengthen texts by a factor of {growth:,}. Use a different model")


def _compute_text_growth(normalizer: Any) -> int:
    if not isinstance(normalizer, dict):
        return 1
    if normalizer.get("type") == "Sequence":
        return math.prod(_compute_text_growth(step) for step in normalizer["normalizers"])
    if normalizer.get("type") != "Replace":
        return 1
    # An empty string matches between all characters, and so may a regular expression.
    can_match_nothing = not normalizer["pattern"].get("String")
    return max(1, len(normalizer["content"]) + can_match_nothing)


@contextmanager
def hide_loading_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars for loading weights, but not for downloads. Also works as a decorator."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    # transformers' functions for progress bars also change huggingface_hub's setting for downloads.
    bars_enabled, downloads_hidden = transformers_logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not downloads_hidden:
        enable_progress_bars()
    try:
        yield
    finally:
        if bars_enabled:
            transformers_logging.enable_progress_bar()
            if downloads_hidden:
                disable_progress_bars()


@contextmanager
def hide_load_report() -> Iterator[None]:
    """Hide transformers' report of missing and unexpected weights. Callers must check for missing weights."""
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def requires_remote_code(path: str, trust_remote_code: bool) -> bool:
    """Return True if a transformers model requires Python code from its own folder or hub repository.

    Raise ValueError if the code is required but `trust_remote_code` is False.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except (OSError, ValueError):  # loading the model will raise a more specific error
        return False
    code_classes = config.get("auto_map") or {}
    is_required = "AutoModel" in code_classes and config.get("model_type") not in CONFIG_MAPPING
    if is_required and not trust_remote_code:
        raise _build_remote_code_error(path)
    return is_required


@contextmanager
def explain_remote_code_error(path: str) -> Iterator[None]:
    """Replace a library's error about `trust_remote_code` with a ValueError that names llm2clip's command-line flag."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code=True" not in str(error):
            raise
        raise _build_remote_code_error(path) from error


def _build_remote_code_error(path: str) -> ValueError:
    return ValueError(
        f"{path} contains Python code, which is not run by default. If you trust the model's authors, pass "
        "--trust_remote_code (in Python: trust_remote_code=True)"
    )


def fingerprint(identity: dict[str, Any]) -> str:
    """Return a hash, as 32 hex digits, of a JSON-serialisable dict such as the `identity()` of an encoder."""
    return hash_text(json.dumps(identity, sort_keys=True))


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def hash_weights(module: nn.Module) -> str:
    """Return a hash, as 32 hex digits, of the values, names, dtypes and shapes of a module's weights and buffers."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items(), key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@hide_loading_progress_bars()
def load_vision_language_model(name: str, device: torch.device, precision: Precision) -> tuple[Any, Any]:
    """Load a vision-language model and its processor for inference. Code in the model folder is never run."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    # LLaVA models with a timm tower require a prior call to `llava.modeling_patches.register_llava_classes`.
    model: Any = AutoModelForImageTextToText.from_pretrained(
        name, config=load_transformers_config(name), dtype=precision.dtype, trust_remote_code=False
    )
    return model.to(device).eval(), AutoProcessor.from_pretrained(name, trust_remote_code=False)


def get_model_name_with_hash(source: str) -> str:
    """Return a model's short name and a hash of its files, such as `llava-9f3a12cd` for the folder `llava/model`.

    Hub models must already be in the hub's cache. The result does not depend on the location of the folder.
    Hashing takes about a second per gigabyte.
    """
    config_file = find_model_file(source, "config.json")
    folder = Path(source) if config_file is None else config_file.parent
    patterns = ("*model*.safetensors", "*model*.bin", "*.pt")
    weights = next((files for pattern in patterns if (files := sorted(folder.glob(pattern)))), [])
    # A folder with EVA weights also contains other weights, so the EVA weights are added explicitly.
    weights += [file for file in sorted(folder.glob("*EVA*.pt")) if file not in weights]
    weights += [folder, folder / "1_Pooling/config.json"]  # `source` may be a single file, so `folder` may be a file
    settings = [folder / name for name in ("config.json", "generation_config.json", "chat_template.jinja")]
    hashes = []
    for file in [*settings, *weights]:
        if file.is_file():
            with file.open("rb") as stream:
                hashes.append(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}")
    short_name = get_display_names([source])[0].rpartition("/")[2]
    return f"{short_name}-{hash_text(' '.join(hashes))[:8]}"
