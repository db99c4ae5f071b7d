"""Export of a tokenizer that applies the caption encoder's template automatically."""

from __future__ import annotations

import copy
from itertools import takewhile
from typing import Any

from llm2clip.models.text.caption_encoder import CaptionEncoder

CHECKED_TEXTS = ("a", "Two dogs, running.", "一只猫", "1")


def build_tokenizer(encoder: CaptionEncoder) -> Any:
    """Return a copy of the encoder's tokenizer that strips each text and adds the template's tokens around it.

    Raises:
        ValueError: the template changes how the text after it is tokenized.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    _strip_texts(tokenizer.backend_tokenizer)
    tokenizer.model_max_length = encoder.st.max_seq_length or 512
    if encoder.prefix:
        _add_template(tokenizer, encoder)
        for text in CHECKED_TEXTS:
            if tokenizer(text)["input_ids"] != encoder.tokenizer(encoder.prefix + text)["input_ids"]:
                raise ValueError(
                    f"the template {encoder.prefix!r} is tokenized differently if the text {text!r} follows it. End "
                    "the template with a special token or a line break"
                )
    return tokenizer


def _strip_texts(backend: Any) -> None:
    """Configure a tokenizer to strip leading and trailing whitespace, as `CaptionEncoder.tokenize` does."""
    from tokenizers import normalizers

    steps = [normalizers.Strip()]
    if backend.normalizer is not None:
        steps.append(backend.normalizer)
    backend.normalizer = normalizers.Sequence(steps)


def _add_template(tokenizer: Any, encoder: CaptionEncoder) -> None:
    """Configure a tokenizer to add the template's tokens and the special tokens before and after every text."""
    from tokenizers.processors import TemplateProcessing

    first, second = (encoder.tokenizer(encoder.prefix + text)["input_ids"] for text in ("a", "1"))
    before = _find_common_prefix(first, second)
    after = _find_common_prefix(first[::-1], second[::-1])[::-1]
    template, special_tokens = "$A", []
    if before:
        template = f"<before> {template}"
        special_tokens.append(_build_special_token(tokenizer, "<before>", before))
    if after:
        template = f"{template} <after>"
        special_tokens.append(_build_special_token(tokenizer, "<after>", after))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special_tokens)


def _build_special_token(tokenizer: Any, name: str, ids: list[int]) -> dict[str, Any]:
    """Build a special token for `TemplateProcessing` that is replaced with a sequence of token ids."""
    return {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}


def _find_common_prefix(first: list[int], second: list[int]) -> list[int]:
    """Return the longest common prefix of two lists of token ids."""
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [token for token, _ in equal]
