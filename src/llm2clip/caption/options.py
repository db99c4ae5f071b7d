"""Options and prompts of captioning runs. The default prompts are in `prompts.yaml`."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llm2clip.config import require_at_least, require_fraction, require_positive

Kind = Literal["short", "dense"]
DEFAULT_FILE = Path(__file__).with_name("prompts.yaml")
CAPTION_FIELD = "{caption}"  # placeholder for the source caption of the image
MAX_TEXT_CHARACTERS = 20_000
MAX_SAMPLES = 100
MAX_TOKENS = 8192
_NAME = re.compile(r"[a-z0-9_]+")


@dataclass
class CaptionOptions:
    """Options of the command `caption`. The attribute docstrings are the help texts."""

    endpoint: str | None = None
    """URL of a server with an OpenAI-compatible chat API, such as http://localhost:8000/v1. The images are sent to this
    server. The API key is read from the environment variable LLM2CLIP_API_KEY."""
    prompts: str | None = None
    """YAML file with prompts. Default: two short captions and one dense caption per image."""
    language: str | None = None
    """Language of the captions, such as "German". Captions in other languages are rejected. Default: the language that
    the model uses for most captions."""
    use_captions: bool = False
    """Insert the first source caption of each image into prompts that contain {caption}."""
    image_size: int = 768
    """Maximum width and height of the images, in pixels. Larger images are downscaled before captioning."""
    batch_size: int = 32
    """Number of images per batch for a local model. The number is halved if a batch does not fit in device memory."""
    concurrency: int = 8
    """Maximum number of concurrent requests to the server."""
    retries: int = 6
    """Maximum number of retries for a failed request."""
    timeout: float = 300.0
    """Maximum response time of the server, in seconds."""
    check: str | None = None
    """Dual encoder for comparing captions with their images: an llm2clip model, or any other model that `evaluate`
    accepts. Default: check only the texts."""
    check_max_rank: float = 0.25
    """Reject a caption if more than this fraction of other images match the caption better than its own image."""
    columns: dict[str, str] = field(default_factory=dict)
    """Source column for each field, e.g. captions=text,image=file."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the images are unreadable, or have no caption because requests failed."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "", "image_size", "batch_size", "concurrency")
        require_at_least(0, self, "", "retries")
        require_positive(self, "", "timeout")
        require_fraction(self, "", "check_max_rank", "max_skipped")


def format_connection_error(address: str, error: Exception) -> str:
    return f"no server responds at {address} ({error}). Start the server, or check the URL"


# ---- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Captioning prompt with its sampling parameters. Invalid values raise ValueError."""

    name: str
    kind: Kind  # "short" for a sentence, "dense" for a detailed description
    text: str  # instruction to the model, including the language of the answer
    samples: int = 1  # number of answers per image
    temperature: float = 0.7  # 0 means greedy decoding
    max_tokens: int = 100  # per answer

    def __post_init__(self) -> None:
        self._check_field_value("kind", self.kind in get_args(Kind), " or ".join(get_args(Kind)))
        is_text = isinstance(self.text, str) and 0 < len(self.text.strip()) <= MAX_TEXT_CHARACTERS
        self._check_field_value("text", is_text, f"a text of 1 to {MAX_TEXT_CHARACTERS:,} characters")
        self._check_integer_field("samples", MAX_SAMPLES)
        is_temperature = type(self.temperature) in (int, float) and 0 <= self.temperature <= 2
        self._check_field_value("temperature", is_temperature, "a number from 0 to 2")
        self._check_integer_field("max_tokens", MAX_TOKENS)

    def _check_integer_field(self, field: str, maximum: int) -> None:
        value = getattr(self, field)
        self._check_field_value(field, type(value) is int and 1 <= value <= maximum, f"an integer from 1 to {maximum}")

    def _check_field_value(self, field: str, is_valid: bool, description: str) -> None:
        if not is_valid:
            value = repr(getattr(self, field))
            shown = value if len(value) <= 100 else f"{value[:100]}..."
            raise ValueError(f"{field} must be {description} (got {shown})")

    @property
    def key(self) -> str:
        """Prompt name plus a hash of the text, so that captions are requested again if the text changes."""
        return f"{self.name}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def insert_caption(self, caption: str | None) -> str:
        """Return the text with {caption} replaced by a caption. If `caption` is None, omit lines with {caption}."""
        if CAPTION_FIELD not in self.text:
            return self.text
        if caption is None:
            return _drop_placeholder_lines(self.text)
        one_line = " ".join(caption.split()).encode(errors="replace").decode()  # without lone surrogates
        return self.text.replace(CAPTION_FIELD, one_line)


def load_prompts(
    file: str | Path | None = None, language: str | None = None, use_captions: bool = False
) -> list[Prompt]:
    """Load prompts from a YAML file.

    Args:
        file: YAML file that maps prompt names to fields. Default: the built-in prompts.
        language: Language of the answers, such as "German". Default: chosen by the model.
        use_captions: If False, remove the lines with {caption} from the prompts.

    Raises:
        ValueError: The file is invalid. The message names the file, the prompt and the field.
        OSError: The file cannot be read.
    """
    path = DEFAULT_FILE if file is None else Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        content, root = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not a valid YAML file ({error})") from error
    if not isinstance(content, dict) or not content or not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path} must map prompt names to fields, as in {DEFAULT_FILE}")
    counts = Counter(key.value for key, _ in root.value)  # safe_load silently drops duplicate names
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"{path}: several prompts have the name {repeated[0]}. Give each prompt a different name")
    prompts = []
    for name, values in content.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"{path}: the name of a prompt must consist of a-z, 0-9 and _ (got {name!r})")
        try:
            prompts.append(_parse_prompt_entry(name, values, language, use_captions))
        except ValueError as error:
            raise ValueError(f"{path}, prompt {name}: {error}") from None
    return prompts


def _parse_prompt_entry(name: str, values: Any, language: str | None, use_captions: bool) -> Prompt:
    if not isinstance(values, dict):
        raise ValueError(f"the prompt must have fields of the form `name: value` (got {values!r})")
    known = [field.name for field in fields(Prompt) if field.name != "name"]
    for key in values:
        if key not in known:
            raise ValueError(f"unknown field {key!r}; available fields: {', '.join(known)}")
    for key in ("kind", "text"):
        if key not in values:
            raise ValueError(f"the field {key} is missing")
    prompt = Prompt(name, **values)
    text = (prompt.text if use_captions else _drop_placeholder_lines(prompt.text)).strip()
    if not text:
        raise ValueError(f"text must contain a line without {CAPTION_FIELD} (got {prompt.text!r})")
    return replace(prompt, text=f"{text}\nAnswer in {language}." if language else text)


def _drop_placeholder_lines(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if CAPTION_FIELD not in line)
