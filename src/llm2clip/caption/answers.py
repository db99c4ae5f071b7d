"""Caption requests, and the conversion of untrusted model output to captions."""

import re
from dataclasses import dataclass
from typing import Any

from llm2clip.caption.options import Prompt

MAX_CAPTION_CHARACTERS = 10_000
# Model output is untrusted, so all regular expressions must run in linear time.
_REASONING_START = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_REASONING_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Matches direction marks, zero-width spaces and lone surrogates, but not zero-width joiners, which emoji contain.
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_MARKDOWN_LINE = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]+|[-*•][ \t]+|```\w{0,20}$)", re.MULTILINE)
_LABEL = re.compile(r"^(?:caption|description|answer|sentence)\s*:\s*", re.IGNORECASE)
_EMPHASIS = re.compile(r"(\*\*|__|`)(?=\S)(.{1,200}?)(?<=\S)\1")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」"}
_SENTENCE_END = re.compile(r".*[.!?。！？](?=\s|$|[\"”’])", re.DOTALL)

# A refusal starts with one of `_REFUSALS`, or with an apology that is followed by one of `_REFUSALS`.
# An apology alone is not a refusal, because a caption can quote the text of a sign.
_REFUSAL_CHARACTERS = 300
_APOLOGY = re.compile(
    r"(?:(?:i am |i'm )?(?:really |very |so )?(?:sorry|afraid)|(?:my )?apologies|i apologi[sz]e|"
    r"unfortunately|es tut mir leid|leider|(?:je suis )?désolée?|lo siento|很?抱歉|对不起)"
    r"(?: for (?:the|any) \w+)?[\s,.!，]*(?:but |aber |mais |pero |我)?",
    re.IGNORECASE,
)
_PHOTO = r"(?:image|picture|photo)s?"
_REFUSALS = (
    r"$",
    r"i (?:can ?not|can't)[.!]*$",
    r"i(?: can ?not| can't| won't be able to| must decline to|(?: am|'m) (?:\w+ly )?(?:unable|not able) to) "
    r"(?:describe|identify|recogni[sz]e|assist|comply|process|help (?:you|with|identify)|do that|write captions?|"
    rf"(?:see|view|access|provide) (?:[\w']+ ){{0,3}}?(?:{_PHOTO}|captions?|descriptions?|details)\b)",
    rf"i (?:do not|don't) (?:have (?:access|the ability)|see (?:an?|any|the) {_PHOTO})\b",
    r"i(?: am|'m) (?:an ai\b|not comfortable (?:describing|identifying))",
    r"as an? (?:[\w-]+ ){0,3}?(?:[\w-]*ai|model|assistant)\b[^.]{0,30},? i\b",
    rf"(?:it (?:seems|looks like|appears) )?(?:that )?(?:there is )?no {_PHOTO} (?:(?:is |was |has been |here )?"
    r"(?:attached|provided|uploaded)(?:[.,!]|$| (?:to|in|with|for) )|to )",
    r"(?:it (?:seems|looks like|appears) )?(?:that )?you (?:have not|haven't|did not|didn't) "
    r"(?:upload|attach|provide|include)",
    rf"(?:please|could you(?: please)?) (?:upload|provide|share|attach) (?:the|an?|your) {_PHOTO}\b",
    rf"the {_PHOTO} (?:could not|cannot) be (?:loaded|displayed|opened)",
    r"this (?:request|content) (?:violates|goes against)\b",
    r"(?:ich kann|kann ich)\b[^.]{0,60}?\b(?:nichts?|keine?)\b[^.]{0,40}?\b(?:sehen|beschreiben|erkennen|helfen)\b",
    r"ich sehe kein (?:bild|foto)|es wurde kein (?:bild|foto)|bitte laden sie|bitte lade das bild",
    r"als ki\b[^.]{0,20} kann ich",
    r"je ne (?:peux|vois) pas\b[^.]{0,30}?\b(?:voir|décrire|identifier|aider|image|photo)\b|en tant que modèle\b",
    r"no (?:puedo|veo)\b[^.]{0,20}?\b(?:ver|describir|identificar|ayudar\w*|imagen|foto)\b",
    r"no tengo acceso a la imagen\b|como modelo de lenguaje\b",
    r"我?(?:无法|不能)[^。]{0,20}?(?:查看|看到|描述|识别(?:图|这)|提供(?:帮助|协助))|作为[^。]{0,12}(?:人工智能|语言模型)|请上传",
    r"申し訳[^。]{0,60}できません|画像[^。]{0,12}(?:できません|ていません)",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    image: Any  # image in the format returned by the captioner's `prepare_image`
    prompt: Prompt
    image_hash: str  # SHA-256 hash of the image's bytes
    sample: int = 0  # zero-based sample number
    caption: str | None = None  # source caption of the image, which is inserted into the prompt

    @property
    def prompt_text(self) -> str:
        return self.prompt.insert_caption(self.caption)


@dataclass(frozen=True, slots=True)
class Answer:
    """Answer to a caption request: either a caption or an error message."""

    text: str | None
    error: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


class CaptioningStoppedError(Exception):
    """Raised when the captioner is stopped before an answer is received."""


def convert_output_to_answer(text: str, truncated: bool, input_tokens: int = 0, output_tokens: int = 0) -> Answer:
    """Convert the output of a model to a caption, or to an error if the output is empty, too long or a refusal.

    Remove reasoning, control characters, invisible characters, Markdown and surrounding quotes.

    Args:
        truncated: True if the output reached the maximum number of tokens. An incomplete last sentence is removed.
    """
    tokens = input_tokens, output_tokens
    if len(text) > 10 * MAX_CAPTION_CHARACTERS:
        return Answer(None, f"too long: {len(text):,} characters", *tokens)
    text = _REASONING_END.split(text)[-1]  # the chat template may contain the opening <think> tag
    if _REASONING_START.search(text):
        return Answer(None, "the reasoning is longer than the prompt's max_tokens", *tokens)
    text = _strip_caption_markup(text)
    if truncated:
        complete = _SENTENCE_END.match(text)
        if complete is None:
            return Answer(None, f"truncated at the prompt's max_tokens: {text[:100]!r}", *tokens)
        text = complete[0]
    if not any(character.isalnum() for character in text):
        return Answer(None, "empty answer", *tokens)
    if is_refusal(text):
        return Answer(None, f"refusal: {text[:200]}", *tokens)
    if len(text) > MAX_CAPTION_CHARACTERS:
        return Answer(None, f"too long: {len(text):,} characters", *tokens)
    return Answer(text, None, *tokens)


def _strip_caption_markup(text: str) -> str:
    text = _MARKDOWN_LINE.sub("", text)
    text = " ".join(_INVISIBLE.sub("", _CONTROL.sub(" ", text)).split())
    text = _EMPHASIS.sub(r"\2", text)
    text = _LABEL.sub("", text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def is_refusal(text: str) -> bool:
    beginning = " ".join(text[:_REFUSAL_CHARACTERS].replace("’", "'").split())
    apology = _APOLOGY.match(beginning)
    return _REFUSAL.match(beginning, apology.end() if apology else 0) is not None
