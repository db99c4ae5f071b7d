"""Options of captioning runs. This module imports only the standard library to keep `llm2clip --help` fast."""

from dataclasses import dataclass, field

from llm2clip.config import require_at_least, require_fraction, require_positive

BATCH_SIZE = 32  # number of images; smaller batches are slower on CPUs


@dataclass
class CaptionOptions:
    """Options of the `caption` command. Each field is a command-line option; its docstring is the help text."""

    endpoint: str | None = None
    """URL of a server with OpenAI's chat API, such as http://localhost:8000/v1. The images are sent to it. Its key is
    read from the environment variable LLM2CLIP_API_KEY."""
    prompts: str | None = None
    """YAML file with prompts. Default: two short captions and a dense one per image."""
    language: str | None = None
    """Language of the captions, such as "German". Captions in other languages are rejected. Default: the model decides,
    and the language of most captions is expected."""
    use_captions: bool = False
    """Give the first caption of each image in the source to the model, in prompts that contain {caption}."""
    image_size: int = 768
    """Shrink images to at most this size, in pixels per side."""
    batch_size: int = BATCH_SIZE
    """Number of images per batch. Not used with --endpoint."""
    concurrency: int = 8
    """Number of requests to the server at the same time."""
    max_requests_per_minute: float | None = None
    """Limit on requests to the server, including retries. Default: no limit."""
    retries: int = 6
    """Number of further attempts after a failed request."""
    timeout: float = 300.0
    """Maximum time for an answer of the server, in seconds."""
    price: tuple[float, float] | None = None
    """Price of a million input tokens and of a million output tokens, to show the cost."""
    max_cost: float | None = None
    """Stop when the stored answers of this model have cost this much in total. Requires --price. Requests that have
    already been sent can exceed it."""
    check: str | None = None
    """Dual encoder that compares each caption with its image: an llm2clip model, or any other model that `evaluate`
    accepts. Default: only the texts are checked."""
    check_max_rank: float = 0.25
    """Reject captions that more than this fraction of other images match better than their own image."""
    columns: dict[str, str] = field(default_factory=dict)
    """Source column for each field, e.g. captions=text,image=file."""
    max_skipped: float = 0.05
    """Stop if more than this fraction of the images is unreadable, or has no caption because its requests failed."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "", "image_size", "batch_size", "concurrency")
        require_at_least(0, self, "", "retries")
        require_positive(self, "", "max_requests_per_minute", "timeout", "max_cost")
        require_fraction(self, "", "check_max_rank", "max_skipped")
        if self.max_cost is not None and self.price is None:
            raise ValueError("--max_cost requires --price INPUT OUTPUT")
        if self.price is not None and min(self.price) < 0:
            raise ValueError(f"--price must be two numbers of at least 0 (got {self.price[0]:g} {self.price[1]:g})")

    def compute_cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the cost of tokens, or 0 if no price is known."""
        input_price, output_price = self.price or (0.0, 0.0)
        return (input_tokens * input_price + output_tokens * output_price) / 1e6
