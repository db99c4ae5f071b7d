"""Quality control of generated captions: text checks, and a comparison of each caption with its image.

`check_captions` needs no model. It compares captions in a temporary table on disk, so its memory use does not depend on
the number of captions. `score_captions` compares captions with their images by using a dual encoder. Both functions
store the reason for rejecting a caption in the column `problem`. Rejected captions are not written to the output.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm2clip.caption.database import CaptionDatabase, ImageRow
from llm2clip.caption.options import Kind, Prompt
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import iter_image_batches
from llm2clip.io_utils import UNSPACED, hash_text_to_int64
from llm2clip.progress import ProgressBar
from llm2clip.store.layout import iter_chunks

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import DualEncoder

# Values of the column `problem`.
BOILERPLATE = "boilerplate opening"
TOO_SHORT, TOO_LONG = "too short", "too long"
REPETITION = "repetition"
WRONG_LANGUAGE = "wrong language"
DUPLICATE = "duplicate for the same image"
MANY_IMAGES = "fits many images"
MISMATCH = "does not match the image"

MIN_WORDS, MIN_CHARACTERS = 3, 4  # MIN_CHARACTERS applies to scripts without spaces
MAX_WORDS: dict[Kind, int] = {"short": 50, "dense": 400}
CHARACTERS_PER_WORD = 2  # in scripts without spaces
MIN_REPETITIONS = 4
MAX_LOOP_WORDS = 4  # longer loops are detected with repeated phrases of `PHRASE_WORDS` words
PHRASE_WORDS = 5
LONG_TEXT_WORDS, MIN_DISTINCT_RATIO = 30, 0.35
MIN_LANGUAGE_PROBABILITY = 0.8
LANGUAGE_CHARACTERS = 200  # number of leading characters from which the language is identified
# In a contrastive batch of 1,000 images, a caption shared by 1 in 1,000 images has about one false negative.
MAX_SHARED_FRACTION, MIN_SHARED_IMAGES = 0.001, 5
ROWS_PER_BATCH = 1000
SAMPLE_SIZE = 1000  # number of images with which each caption is compared
IMAGES_PER_BATCH = 64
TIE = 1e-6  # smaller differences between cosine similarities are treated as ties

# py3langid's language codes.
LANGUAGES = {
    "arabic": "ar", "chinese": "zh", "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "finnish": "fi",
    "french": "fr", "german": "de", "greek": "el", "hebrew": "he", "hindi": "hi", "hungarian": "hu", "italian": "it",
    "japanese": "ja", "korean": "ko", "polish": "pl", "portuguese": "pt", "romanian": "ro", "russian": "ru",
    "spanish": "es", "swedish": "sv", "thai": "th", "turkish": "tr", "ukrainian": "uk", "vietnamese": "vi",
}  # fmt: skip

# ---- patterns --------------------------------------------------------------------------------------------------------

_LETTERS = rf"(?:(?!{UNSPACED.pattern})[^\W_])+"
# A word is a sequence of letters and digits, or a single character of a script without spaces.
_WORD = re.compile(rf"{UNSPACED.pattern}|{_LETTERS}(?:['’-]{_LETTERS})*")

_NOUN = "(?:image|photograph|photo|picture|snapshot|scene)"
_VERB = "(?:shows|depicts|displays|features|captures|presents|portrays|contains|illustrates|showcases)"
_OF = f"(?:of|showing|depicting|featuring|that {_VERB})"
_ENGLISH_OPENINGS = (
    # "Sure! Here is a caption for the image:"
    r"(?:(?:sure|certainly|of course|okay|ok)\b[!,.:]* *)?here(?:'s| is| are)\b[^:.]{0,40}"
    r"\b(?:captions?|descriptions?|sentences?|answers?|paragraphs?)\b[^:.]{0,30}:",
    # "The image shows", "This photo clearly depicts", "The picture is of", "The image is a photo of"
    rf"(?:the|this) {_NOUN} (?:clearly |also )?(?:{_VERB}|is showing|is of|is (?:an?|the) {_NOUN} {_OF})\b",
    # "This is a picture of", "It's an image showing", "A photo of"
    rf"(?:(?:this|it|here) is|it's|here's) (?:an?|the) {_NOUN} {_OF}\b",
    rf"an? (?:image|photograph|photo|snapshot) {_OF}\b",
    # "In this picture, we can see", "In the image there is", "We can see"
    rf"in (?:this|the) {_NOUN},? (?:(?:we|you|i|one) (?:can )?(?:see|observe)|there (?:is|are))\b",
    rf"in this {_NOUN},",
    r"(?:we|you|i|one) can (?:see|observe)\b",
)
_AFTER_OPENING = (
    r"(?: of\b)?(?: what (?:appears|seems|looks) (?:to be|like)\b)?(?: that\b)?(?: there (?:is|are)\b)?[\s,]*"
)
# Words that cannot start a caption. The opening is kept before such words: "The image shows how a dog jumps".
_INCOMPLETE = re.compile(r"(?:how|what|where|when|why|whether|of|and|or)\b|$", re.IGNORECASE)
_CHINESE_IMAGE = "(?:图片|圖片|照片|图像|圖像|相片|画面|畫面|图|圖)"
_OTHER_OPENINGS = (
    # German
    r"(?:das|dieses) (?:bild|foto) zeigt\b",
    r"auf (?:dem|diesem) (?:bild|foto) ",
    r"(?:das|dies|hier|es) ist ein (?:bild|foto) (?:von|einer|eines)\b",
    # French
    r"(?:l'image|la photo|cette image|cette photo) (?:montre|représente|présente)\b",
    r"(?:sur|dans) (?:l'image|la photo|cette image|cette photo)\b",
    r"c'est une (?:image|photo) (?:de |d')",
    # Chinese
    rf"在?[这這此该該]?[张張幅]?{_CHINESE_IMAGE}(?:中|里|裡|上|显示|顯示|展示|描绘|描繪|呈现|呈現)",
    rf"[这這]是一[张張幅].{{0,12}}{_CHINESE_IMAGE}",
)


def _compile_regex_alternation(patterns: Iterable[str], suffix: str = "") -> re.Pattern[str]:
    return re.compile(f"(?:{'|'.join(patterns)}){suffix}", re.IGNORECASE)


_ENGLISH_OPENING = _compile_regex_alternation(_ENGLISH_OPENINGS, _AFTER_OPENING)
_ANY_OPENING = _compile_regex_alternation((*_ENGLISH_OPENINGS, *_OTHER_OPENINGS))


# ---- checks of individual captions -----------------------------------------------------------------------------------


def strip_boilerplate_opening(text: str) -> str:
    """Remove an English boilerplate opening: "The image shows a dog" becomes "A dog".

    The opening is kept if the remaining text is not a caption, as in "The image shows how a dog jumps".
    """
    for _ in range(3):  # up to three openings, as in "Sure! Here is a caption: The image shows a photo of a dog"
        opening = _ENGLISH_OPENING.match(text.replace("’", "'"))
        if opening is None:
            break
        rest = text[opening.end() :]
        if _INCOMPLETE.match(rest):
            break
        text = rest[0].upper() + rest[1:] if text[0].isupper() else rest
    return text


def split_words(text: str) -> list[str]:
    """Split a text into words. In scripts without spaces, each character is a word."""
    return _WORD.findall(text)


def make_word_key(words: Sequence[str]) -> str:
    """Join words into a key that ignores case and Unicode compatibility variants."""
    return unicodedata.normalize("NFKC", " ".join(words)).casefold()


def find_text_problem(text: str, kind: Kind) -> str | None:
    """Return the reason to reject a caption, or None. Call `strip_boilerplate_opening` before this function."""
    if _ANY_OPENING.match(text.replace("’", "'")):
        return BOILERPLATE
    words = split_words(text)
    if problem := _find_length_problem(text, words, kind):
        return problem
    return REPETITION if _is_repetitive([word.casefold() for word in words]) else None


def _find_length_problem(text: str, words: Sequence[str], kind: Kind) -> str | None:
    num_characters = len(UNSPACED.findall(text))
    is_unspaced = 2 * num_characters > len(words)
    if len(words) < (MIN_CHARACTERS if is_unspaced else MIN_WORDS):
        return TOO_SHORT
    if len(words) > MAX_WORDS[kind] * (CHARACTERS_PER_WORD if is_unspaced else 1):
        return TOO_LONG
    return None


def _is_repetitive(words: Sequence[str]) -> bool:
    """Detect loops such as "a dog and a dog and a dog and a dog", and long texts with few distinct words."""
    for length in range(1, MAX_LOOP_WORDS + 1):
        num_equal = 0  # number of consecutive words that equal the word `length` positions earlier
        for word, earlier in zip(words[length:], words, strict=False):
            num_equal = num_equal + 1 if word == earlier else 0
            # The last word of the last repetition may be missing, as in "a dog and a dog and a dog and a dog".
            if num_equal == length * (MIN_REPETITIONS - 1) - (length > 1):
                return True
    phrases = Counter(zip(*(words[start:] for start in range(PHRASE_WORDS)), strict=False))
    if phrases and phrases.most_common(1)[0][1] >= MIN_REPETITIONS:
        return True
    return len(words) >= LONG_TEXT_WORDS and len(set(words)) < MIN_DISTINCT_RATIO * len(words)


def identify_language(text: str) -> str | None:
    """Return the language code of a text, such as "en", or None if the identification is uncertain.

    The code is wrong for 0 of 13,468 English captions from Flickr8k and COCO, and for 1 of 6,548 German captions.
    """
    language, probability = _load_language_identifier().classify(text[:LANGUAGE_CHARACTERS])
    return str(language) if probability >= MIN_LANGUAGE_PROBABILITY else None


@cache
def _load_language_identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def find_language_code(language: str) -> str | None:
    """Convert the English name or the code of a language to a code. Return None if the language is unknown."""
    name = language.strip().lower()
    if name in LANGUAGES.values():
        return name
    return next((code for known, code in LANGUAGES.items() if known in name), None)


# ---- checks across captions ------------------------------------------------------------------------------------------

# `position` is the index of the prompt, and `words_key` is a hash of the text without its opening.
_TEMPORARY_TABLE = """
CREATE TEMP TABLE checks(
  hash TEXT, position INTEGER, sample INTEGER, words_key INTEGER, language TEXT, problem TEXT,
  PRIMARY KEY(hash, position, sample)
) WITHOUT ROWID
"""
_MARK_LANGUAGE = "UPDATE temp.checks SET problem = ? WHERE position = ? AND problem IS NULL AND language <> ?"
_MARK_DUPLICATES = """
UPDATE temp.checks SET problem = ? FROM (
  SELECT hash, position, sample, row_number() OVER (PARTITION BY hash, words_key ORDER BY position, sample) AS number
  FROM temp.checks WHERE problem IS NULL
) AS numbered WHERE number > 1 AND checks.hash = numbered.hash
  AND checks.position = numbered.position AND checks.sample = numbered.sample
"""
_MARK_SHARED = """
UPDATE temp.checks SET problem = ? WHERE problem IS NULL AND words_key IN (
  SELECT words_key FROM temp.checks WHERE problem IS NULL GROUP BY words_key HAVING count(*) > ?)
"""
# Rejections by an earlier comparison with the images (--check) are kept if the text checks find no problem.
_STORE_PROBLEMS = """
UPDATE answers SET problem = checks.problem FROM temp.checks
WHERE answers.hash = checks.hash AND answers.sample = checks.sample AND answers.model = ? AND answers.prompt = ?
  AND checks.position = ? AND answers.problem IS NOT checks.problem
  AND NOT (answers.problem IS ? AND checks.problem IS NULL)
"""


@dataclass
class TextCheckSummary:
    """Summary of the text checks of a captioning run."""

    max_images: int  # maximum number of images with the same caption
    num_captions: int = 0  # number of checked captions
    num_shortened: int = 0  # number of captions from which an opening was removed


def check_captions(
    database: CaptionDatabase, model: str, prompts: Sequence[Prompt], language: str | None = None
) -> TextCheckSummary:
    """Check the texts of a model's captions. Store the reason for each rejection in the database.

    Args:
        prompts: Prompts whose captions are checked. If an image has duplicate captions, only the caption of the first
            prompt is accepted.
        language: Expected language. Default: for each prompt, the language of most captions.
    """
    checks = TextCheckSummary(max_images=max(MIN_SHARED_IMAGES, int(MAX_SHARED_FRACTION * database.count_images())))
    with database.transaction():
        database.connection.execute(_TEMPORARY_TABLE)
        for position, prompt in enumerate(prompts):
            for batch in _iterate_captions(database, model, prompt):
                rows = [_build_check_row(answer, position, prompt, checks) for answer in batch]
                database.connection.executemany("INSERT INTO temp.checks VALUES (?, ?, ?, ?, ?, ?)", rows)
            code = find_language_code(language) if language else _find_majority_language(database, position)
            if code is not None:
                database.connection.execute(_MARK_LANGUAGE, (WRONG_LANGUAGE, position, code))
        database.connection.execute(_MARK_DUPLICATES, (DUPLICATE,))
        database.connection.execute(_MARK_SHARED, (MANY_IMAGES, checks.max_images))
        for position, prompt in enumerate(prompts):
            database.connection.execute(_STORE_PROBLEMS, (model, prompt.key, position, MISMATCH))
        database.connection.execute("DROP TABLE temp.checks")
    return checks


def _iterate_captions(database: CaptionDatabase, model: str, prompt: Prompt) -> Iterator[list[tuple[str, int, str]]]:
    """Yield batches of (image hash, sample number, text) for a prompt's captions of the current images."""
    query = """SELECT hash, sample, text FROM answers
      WHERE (hash, sample) > (?, ?) AND model = ? AND prompt = ? AND sample < ? AND text IS NOT NULL
        AND EXISTS (SELECT 1 FROM images WHERE images.hash = answers.hash)
      ORDER BY hash, sample LIMIT ?"""
    last: tuple[str, int] = ("", -1)
    while True:
        parameters = (*last, model, prompt.key, prompt.samples, ROWS_PER_BATCH)
        rows = database.connection.execute(query, parameters).fetchall()
        if not rows:
            break
        yield rows
        last = rows[-1][:2]


def _build_check_row(
    answer: tuple[str, int, str], position: int, prompt: Prompt, checks: TextCheckSummary
) -> tuple[str, int, int, int, str | None, str | None]:
    """Return the row of an answer in the temporary table, and update the counts in `checks`."""
    image_hash, sample, text = answer
    shortened = strip_boilerplate_opening(text)
    problem = find_text_problem(shortened, prompt.kind)
    checks.num_captions += 1
    checks.num_shortened += shortened != text
    language = None if problem else identify_language(shortened)
    words_key = hash_text_to_int64(make_word_key(split_words(shortened)))
    return image_hash, position, sample, words_key, language, problem


def _find_majority_language(database: CaptionDatabase, position: int) -> str | None:
    """Return the language of the majority of captions whose language was identified, or None without a majority."""
    query = "SELECT language, count(*) FROM temp.checks WHERE position = ? AND language IS NOT NULL GROUP BY language"
    counts = Counter(dict(database.connection.execute(query, (position,))))
    code, count = counts.most_common(1)[0] if counts else (None, 0)
    return code if 2 * count > counts.total() else None


# ---- comparison with the images --------------------------------------------------------------------------------------


@dataclass
class ImageCheckSummary:
    """Summary of the comparison of captions with their images."""

    encoder: str  # name of the dual encoder
    max_rank: float
    sample_size: int = 0  # number of images with which each caption was compared
    num_captions: int = 0  # number of compared captions
    num_unreadable: int = 0  # number of images that could not be decoded


def score_captions(
    database: CaptionDatabase,
    model: str,
    prompts: Sequence[Prompt],
    encoder: DualEncoder,
    max_rank: float,
) -> ImageCheckSummary:
    """Compare captions with their images, and reject captions that match too many other images better.

    Captions that the text checks rejected are skipped. The score of a caption is its cosine similarity to its image.
    The rank is the fraction of a sample of other images that match the caption better, from 0 to 1. Ties count half.

    Captions with a rank above `max_rank` are rejected. The mean rank of random captions is 0.5 for any encoder, so,
    unlike a score threshold, `max_rank` does not depend on the encoder.
    """
    sample_hashes, sample = _encode_sample_images(database, encoder)
    result = ImageCheckSummary(encoder.name, max_rank, sample_size=len(sample_hashes))
    with ProgressBar(total=database.count_images(), desc="checking", unit="image") as bar:
        for rows in iter_chunks(database.iterate_image_rows(distinct=True), IMAGES_PER_BATCH):
            hashes, embeddings = _encode_image_rows(database, rows, encoder)
            result.num_unreadable += len(rows) - len(hashes)
            answers, owners = [], []
            for owner, image_hash in enumerate(hashes):
                for answer in database.list_answers(image_hash, model, prompts):
                    # Captions that were rejected by an earlier comparison with the images are compared again.
                    if answer.text is not None and answer.problem in (None, MISMATCH):
                        answers.append(answer)
                        owners.append(owner)
            if answers:
                texts = encoder.encode_texts([strip_boilerplate_opening(answer.text or "") for answer in answers])
                is_own = torch.tensor([[hashes[owner] == other for other in sample_hashes] for owner in owners])
                scores, ranks = rank_captions(texts, embeddings[owners], sample, is_own)
                scored = []
                for answer, score, rank in zip(answers, scores.tolist(), ranks.tolist(), strict=True):
                    problem = MISMATCH if rank > max_rank else None
                    scored.append(replace(answer, problem=problem, score=score, rank=rank))
                database.update_check_results(scored)
                result.num_captions += len(scored)
            bar.update(len(rows))
    return result


def rank_captions(texts: Tensor, images: Tensor, sample: Tensor, is_own: Tensor) -> tuple[Tensor, Tensor]:
    """Return the score and the rank of each caption (see `score_captions`).

    Args:
        texts: Embeddings of N captions, of shape (N, D).
        images: Embedding of each caption's image, of shape (N, D).
        sample: Embeddings of S images, of shape (S, D).
        is_own: Boolean mask of shape (N, S), True where a sample image is the caption's own image. These pairs do
            not affect the rank.

    Returns:
        Scores (cosine similarities) and ranks (fractions of other images that match better), both of shape (N,). If
        there are no other images, the rank is 0.
    """
    scores = (texts * images).sum(1)
    differences = texts @ sample.T - scores[:, None]  # (N, S)
    is_better, is_equal = differences > TIE, differences.abs() <= TIE
    num_better = ((is_better + 0.5 * is_equal) * ~is_own).sum(1)
    num_others = (~is_own).sum(1)
    return scores, num_better / num_others.clamp(min=1)


def _encode_sample_images(database: CaptionDatabase, encoder: DualEncoder) -> tuple[list[str], Tensor]:
    """Return the hashes and embeddings of a sample of the images.

    The sample consists of the images with the smallest hashes, so adding a few images hardly changes the sample.
    """
    query = "SELECT min(number) FROM images GROUP BY hash ORDER BY hash LIMIT ?"
    numbers = [number for (number,) in database.connection.execute(query, (SAMPLE_SIZE + 1,))]
    return _encode_image_rows(database, [database.read_image_row(number) for number in numbers], encoder)


def _encode_image_rows(
    database: CaptionDatabase, rows: Sequence[ImageRow], encoder: DualEncoder
) -> tuple[list[str], Tensor]:
    refs = [find_image_file(database, row) for row in rows]
    hashes: list[str] = []
    embeddings = [torch.empty(0, encoder.embed_dim)]
    for indices, images, _ in iter_image_batches(refs, encoder.transform, IMAGES_PER_BATCH):
        hashes += [rows[index].hash for index in indices]
        if images:
            embeddings.append(encoder.encode_images(images))
    return hashes, torch.cat(embeddings)


def find_image_file(database: CaptionDatabase, row: ImageRow) -> FileImage:
    """Return the image file of a record. Relative paths are resolved against the output folder."""
    return FileImage(str(Path(database.file).absolute().parent / row.record["image"]))
