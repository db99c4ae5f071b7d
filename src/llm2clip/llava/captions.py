"""Captions of a model against those of people: BLEU-4 and CIDEr-D.

The scores are pycocoevalcap's, the code that COCO's captions are scored by. Its tokenizer is a Java program; here words
are split as it does it in captions (Penn Treebank's way: n't and 's apart, no punctuation, lower case), without its
rules for what captions hardly have. Figures differ from those by its tokenizer where captions have such things.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)(?!\w)|[\w$%&@+*/#]+(?:[-'./,:]\w+)*", re.UNICODE)
_APART = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}


def words(text: str) -> str:
    """A caption as it is compared: its words in lower case, one space between them."""
    text = text.lower().replace("’", "'")
    return " ".join(_APART.get(word, word) for word in _WORD.findall(_CLITIC.sub(r" \1", text)))


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4 of all captions (Papineni et al., ACL 2002), and the mean CIDEr-D (arXiv 1411.5726), both in percent
    as COCO's leaderboard has them.

    Args:
        captions: one of each picture.
        references: people's, of each picture.

    Raises:
        ImportError: pycocoevalcap is not installed.
        ValueError: there are fewer than two pictures: CIDEr weighs words by how many pictures they are said of.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ImportError(f"captions are scored with `pip install llm2clip[llava]` ({error})") from error
    if len(captions) < 2:
        raise ValueError("CIDEr takes two pictures at least")
    found = {n: [words(caption)] for n, caption in enumerate(captions)}
    people = {n: [words(one) for one in some] for n, some in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):  # Bleu prints
        bleu, _ = Bleu(4).compute_score(people, found)
        cider, _ = Cider().compute_score(people, found)
    return {"BLEU-4": 100 * float(bleu[3]), "CIDEr-D": 100 * float(cider)}
