"""BLEU-4 and CIDEr-D scores for generated captions.

The scores are computed by pycocoevalcap, the COCO caption evaluation code. Its tokenizer is a Java program, so
`tokenize` reimplements the rules that matter for captions: Penn Treebank tokens (n't and 's are separate), no
punctuation, lower case. Rules for text that is rare in captions are not implemented, so the scores of captions with
such text can differ from those computed with the Java tokenizer.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

from llm2clip.extras import install_command

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))(?!\w)")
_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)(?!\w)|[\w$%&@+*/#]+(?:[-'./,:]\w+)*", re.UNICODE)
_SPLIT_WORDS = {"cannot": "can not", "gonna": "gon na", "wanna": "wan na", "gotta": "got ta"}


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the corpus BLEU-4 (Papineni et al., ACL 2002) and the mean CIDEr-D (arXiv 1411.5726).

    Both scores are multiplied by 100, as on the COCO leaderboard.

    Args:
        captions: one generated caption per image.
        references: human captions for each image.

    Raises:
        ImportError: pycocoevalcap is not installed.
        ValueError: there are fewer than two images. CIDEr weights each word by the number of images whose captions
            contain that word.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise ImportError(f"to score captions, run `{install_command('llava')}` ({error})") from error
    if len(captions) < 2:
        raise ValueError(f"CIDEr needs at least two images (got {len(captions)})")
    hypotheses = {n: [tokenize(caption)] for n, caption in enumerate(captions)}
    targets = {n: [tokenize(text) for text in texts] for n, texts in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):  # suppress the output that Bleu prints
        bleu, _ = Bleu(4).compute_score(targets, hypotheses)
        cider, _ = Cider().compute_score(targets, hypotheses)
    return {"BLEU-4": 100 * float(bleu[3]), "CIDEr-D": 100 * float(cider)}


def tokenize(text: str) -> str:
    """Return the tokens of a caption in lower case, separated by single spaces."""
    text = text.lower().replace("’", "'")
    words = _WORD.findall(_CLITIC.sub(r" \1", text))
    return " ".join(_SPLIT_WORDS.get(word, word) for word in words)
