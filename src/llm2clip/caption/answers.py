"""Requests to a captioner and its answers, which are cleaned because a model's output is untrusted text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from llm2clip.caption.options import Prompt

MAX_CHARACTERS = 10_000  # longer answers are rejected
# All expressions take linear time, because answers can be hostile.
_REASONING_START = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_REASONING_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# Text direction marks, zero-width spaces and lone surrogates. Zero-width joiners are part of words and emoji.
_INVISIBLE = re.compile(r"[\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_MARKDOWN_LINE = re.compile(r"^[ \t]*(?:#{1,6}[ \t]+|>[ \t]+|[-*•][ \t]+|```\w{0,20}$)", re.MULTILINE)
_LABEL = re.compile(r"^(?:caption|description|answer|sentence)\s*:\s*", re.IGNORECASE)
_EMPHASIS = re.compile(r"(\*\*|__|`)(?=\S)(.{1,200}?)(?<=\S)\1")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "„": "“", "「": "」"}
_REFUSAL_CHARACTERS = 300  # at the beginning of an answer, in which a refusal is expected
_SENTENCE_END = re.compile(r".*[.!?。！？](?=\s|$|[\"”’])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """A request for a caption.

    Attributes:
        image: The image in the form that `Captioner.prepare` returns.
        sample: Number of the sample, from 0.
        caption: Caption of the image in the source, or None.
    """

    image: Any
    prompt: Prompt
    sample: int = 0
    caption: str | None = None

    @property
    def text(self) -> str:
        """The prompt's text for this image."""
        return self.prompt.fill(self.caption)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a request: either a text, or the error because of which there is none."""

    text: str | None
    error: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0


class Captioner(Protocol):
    """A model that writes captions.

    Attributes:
        name: Name of the model, which is recorded with each caption.
        batch_size: Number of requests with the same prompt per call.
        workers: Number of threads that call `ask` at the same time.
        worked_before: True if an earlier run has stored captions by this model. An image that the model rejects then
            does not stop the run.
    """

    name: str
    batch_size: int
    workers: int
    worked_before: bool

    def prepare(self, image: Tensor) -> Any:
        """Convert a uint8 image of shape (3, H, W) to the form that requests contain."""

    def ask(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        """Return an answer for each request.

        Raises:
            StoppedError: The captioner was stopped before there was an answer. The next run sends the requests.
            ValueError: No request can succeed, for example because the key is wrong.
        """

    def stop(self) -> None:
        """Make `ask` raise StoppedError instead of waiting before another attempt."""


class StoppedError(Exception):
    """The captioner was stopped before there was an answer."""


def clean_answer(text: str, truncated: bool, input_tokens: int = 0, output_tokens: int = 0) -> Answer:
    """Convert a model's output to a caption, or to an error if it is a refusal, empty or too long.

    Reasoning, control characters, invisible characters, markdown and surrounding quotes are removed.

    Args:
        truncated: The output ended at the maximum number of tokens. Its last, incomplete sentence is removed.
    """
    tokens = input_tokens, output_tokens
    if len(text) > 10 * MAX_CHARACTERS:
        return Answer(None, f"too long: {len(text):,} characters", *tokens)
    text = _REASONING_END.split(text)[-1]  # chat templates can contain the start of the reasoning
    if _REASONING_START.search(text):
        return Answer(None, "the reasoning did not end within max_tokens of the prompt", *tokens)
    text = _strip_markup(text)
    if truncated:
        complete = _SENTENCE_END.match(text)
        if complete is None:
            return Answer(None, f"truncated at max_tokens of the prompt: {text[:100]!r}", *tokens)
        text = complete[0]
    if not any(character.isalnum() for character in text):
        return Answer(None, "empty answer", *tokens)
    if is_refusal(text):
        return Answer(None, f"refusal: {text[:200]}", *tokens)
    if len(text) > MAX_CHARACTERS:
        return Answer(None, f"too long: {len(text):,} characters", *tokens)
    return Answer(text, None, *tokens)


def _strip_markup(text: str) -> str:
    """Return a text as one line without markdown, labels, invisible characters and surrounding quotes."""
    text = _MARKDOWN_LINE.sub("", text)
    text = " ".join(_INVISIBLE.sub("", _CONTROL.sub(" ", text)).split())
    text = _EMPHASIS.sub(r"\2", text)
    text = _LABEL.sub("", text)
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


# ---- refusals --------------------------------------------------------------------------------------------------------

# A caption can begin like a refusal, for example if it quotes a sign. Therefore, an apology is not sufficient: it must
# be followed by what the model cannot do, or by a missing image.
_CANNOT = (
    r"(?:can ?not|can't|won't be able to|do not|don't|must decline to|"
    r"(?:am|'m) (?:\w+ly )?(?:unable to|not able to))"
)
_PHOTO = r"(?:image|picture|photo)"
_THING = rf"(?:{_PHOTO}s?|captions?|descriptions?|details?|assumptions?)\b"
_REFUSALS = (
    # English
    r"(?:(?:(?:i am |i'm )?(?:really |very |so )?(?:sorry|afraid)|(?:my )?apologies|i apologi[sz]e|unfortunately)"
    r"(?: for (?:the|any) \w+)?[\s,.!]*(?:but )?)?(?:"
    rf"i ?{_CANNOT} (?:describe|identify|assist|comply|recogni[sz]e|help (?:you|with|identify)|do that|"
    rf"have (?:the ability|access)|(?:see|view|process|access|provide|make|write) (?:[\w']+ ){{0,3}}?{_THING})|"
    r"i (?:can ?not|can't)[.!]*$|$|i(?: am|'m) (?:an ai|not comfortable (?:describing|identifying|with))\b|"
    rf"(?:it (?:seems|looks|appears)(?: like| that)? )?(?:(?:there is )?no {_PHOTO}(?: is| was| has been)? "
    r"(?:attached|provided|uploaded|here)(?:[.,!]|$| to (?:your|this|describe|provide|caption)\b)|"
    r"you (?:have not|haven't|did not|didn't) (?:upload|attach|provide|include)|"
    rf"the {_PHOTO} (?:did not load|(?:could not|cannot) be (?:loaded|displayed|opened)))|"
    rf"(?:please|could you(?: please)?) (?:upload|provide|share|attach|send) (?:the|an?|your) {_PHOTO}\b|"
    r"this (?:request|content) (?:violates|goes against)\b)",
    r"as an? (?:[\w-]+ ){0,3}?(?:[\w-]*ai|model|assistant)\b[^.]{0,30},? i\b",
    # German
    r"(?:es tut mir leid[\s,]*(?:aber )?|leider )?(?:(?:ich kann|kann ich)\b[^.]{0,60}?\b(?:nichts?|keine?[nrms]?)\b"
    r"[^.]{0,40}?\b(?:sehen|beschreiben|erkennen|identifizieren|helfen)\b|ich sehe kein (?:bild|foto))",
    r"als (?:eine? )?ki\b[^.]{0,20} (?:kann|darf|habe|bin) ich|es wurde kein (?:bild|foto)|"
    r"bitte lade?n? (?:sie )?[^.]{0,15}(?:bild|foto)",
    # French
    r"(?:(?:je suis )?désolée?[\s,]*(?:mais )?)?je ne (?:peux|vois|suis) pas\b[^.]{0,30}?"
    r"\b(?:voir|décrire|identifier|aider|image|photo)\b|en tant qu(?:e modèle|'ia|'assistant)\b",
    # Spanish
    r"(?:lo siento[\s,]*(?:pero )?)?no (?:puedo|veo|tengo acceso)\b[^.]{0,20}?"
    r"\b(?:ver|describir|identificar|ayudar\w*|imagen|foto)\b|"
    r"como (?:una? )?(?:modelo de lenguaje|ia)\b[^.]{0,30}\bno\b",
    # Chinese
    r"(?:(?:很?抱歉|对不起|對不起)[，,]\s*我?|我)(?:无法|無法|不能)[^。]{0,20}?"
    r"(?:查看|看到|描述|识别|識別|帮|幫|提供)",
    r"作为[^。]{0,12}(?:人工智能|语言模型)[^。]{0,12}(?:无法|不能)|请(?:上传|提供)[^。]{0,6}(?:图|照片)",
    # Japanese
    r"申し訳[^。]{0,60}(?:できません|できかねます)|画像[^。]{0,12}(?:できません|ていません)",
)
_REFUSAL = re.compile("|".join(_REFUSALS), re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Return True if a text begins with a refusal to write a caption."""
    beginning = " ".join(text[:_REFUSAL_CHARACTERS].replace("’", "'").split())
    return _REFUSAL.match(beginning) is not None
