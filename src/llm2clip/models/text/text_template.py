"""Template of a caption encoder (the text around a caption), and the number of tokens before the caption."""

from __future__ import annotations

from typing import Any

CAPTION = "{caption}"


def set_template(st: Any, template: str) -> None:
    """Set the template of a SentenceTransformer. It is saved with the model.

    The text before the caption becomes the SentenceTransformer's default prompt and is excluded from pooling. If a
    special token follows the caption, the tokenizer adds that token to every text.

    Raises:
        ValueError: the template is not valid for this model.
    """
    if template.count(CAPTION) != 1:
        raise ValueError(f"template must contain {CAPTION} exactly once (got {template!r})")
    prefix, suffix = template.split(CAPTION)
    if suffix:
        _set_suffix(st.tokenizer, suffix)
    st.default_prompt_name, st[1].include_prompt = None, True
    if prefix:
        st.prompts["caption"] = prefix
        st.default_prompt_name = "caption"
        st[1].include_prompt = False
        if not has_consistent_length(st, prefix):
            raise ValueError(
                f"sentence-transformers would miscount the tokens of the template's prefix {prefix!r}: it must not "
                f"end in a space. It may end in a special token only if a token also follows {CAPTION}"
            )


def _set_suffix(tokenizer: Any, suffix: str) -> None:
    """Make the tokenizer append the special token `suffix` instead of adding its default special tokens."""
    from tokenizers.processors import TemplateProcessing

    ids = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] not in tokenizer.all_special_ids:
        raise ValueError(f"template: only one special token may follow {CAPTION}, not {suffix!r} (tokens: {len(ids)})")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {suffix}", special_tokens=[(suffix, ids[0])]
    )


def prompt_length(tokenizer: Any, prompt: str) -> int:
    """Return the number of tokens before a caption: the prompt's tokens and any special token at the start of the text.

    These are the leading tokens that do not depend on the caption. Tokenizing the prompt alone would give the wrong
    count if the prompt ends in a space, because the space becomes part of the next token.
    """
    if not prompt:
        return 0
    first, second = tokenizer([prompt + "a", prompt + "1"], return_attention_mask=False)["input_ids"]
    return next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)


def has_consistent_length(st: Any, prompt: str) -> bool:
    """Return True if sentence-transformers and `prompt_length` count the same number of tokens in a prompt."""
    return bool(st[0]._get_prompt_length(prompt) == prompt_length(st.tokenizer, prompt))
