"""Measure how many captions the comparison with the images rejects, for several values of --check_max_rank.

    python benchmarks/caption_checks.py DATA/flickr8k/captions.jsonl@val MODEL

MODEL is a dual encoder that has not been trained on the images. The table shows which share of human captions (two for
each of 400 images) is rejected, and which share of the same captions after each has been assigned to a random other
image.
"""

from itertools import islice

import torch

from llm2clip.caption.checks import rank_captions
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.models.dual_encoder import open_dual_encoder
from shared import make_parser, print_header, print_row

IMAGES, CAPTIONS_PER_IMAGE = 400, 2
MAX_RANKS = (0.1, 0.2, 0.25, 0.3, 0.5)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("source", help="source of images with human captions")
    parser.add_argument("model")
    args = parser.parse_args()
    records = list(islice(open_records(args.source), IMAGES))
    embeddings = ModelEmbeddings(open_dual_encoder(args.model), SkipLog())
    images, indices = embeddings.encode_images([record.image for record in records if record.image is not None])
    captions = [records[index].captions[:CAPTIONS_PER_IMAGE] for index in indices]
    texts = embeddings.encode_texts([caption for group in captions for caption in group])
    own = torch.tensor([n for n, group in enumerate(captions) for _ in group])
    generator = torch.Generator().manual_seed(0)
    other = (own + torch.randint(1, len(images), own.shape, generator=generator)) % len(images)
    ranks = []
    for image in (own, other):
        is_own = image[:, None] == torch.arange(len(images))  # (captions, images)
        ranks.append(rank_captions(texts, images[image], images, is_own)[1])
    print_header("maximum rank", "human captions rejected", "wrong captions rejected")
    for max_rank in MAX_RANKS:
        own_rejected, other_rejected = ((rank > max_rank).float().mean() for rank in ranks)
        print_row(max_rank, f"{own_rejected:.1%}", f"{other_rejected:.1%}")


if __name__ == "__main__":
    main()
