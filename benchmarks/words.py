"""Measure how word search changes the ranking of descriptions. For text recognition, see ocr.py.

    python benchmarks/words.py --index INDEX --model MODEL [--count 1000]

The command copies the vectors and captions of an index. The queries are the first captions of the images, which the
copy lacks. It prints how often the right image comes first, with and without word search.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery, truncate_to_index
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, required=True, help="index of images with at least two captions each")
    parser.add_argument("--model", required=True, help="model that built the index")
    parser.add_argument("--count", type=int, default=200, help="number of queries")
    args = parser.parse_args()
    measure_fusion(args.index, args.model, args.count)


def measure_fusion(folder: Path, model_name: str, count: int) -> None:
    source = SqliteBackend(folder)
    model = truncate_to_index(source.metadata(), open_dual_encoder(model_name))
    copy, queries, contents, images = SqliteBackend(Path(tempfile.mkdtemp()), write=True), [], [], []
    copy.initialize(source.metadata())
    for hit in source.search(None, count, Filter()):
        vector, image = source.vector(hit.id), hit.images[0]
        assert vector is not None and len(image.captions) > 1
        queries.append(image.captions[0])
        contents.append(
            IndexedContent(hit.id.encode(), vector.astype(np.float16), b"", width=hit.width, height=hit.height)
        )
        described = IndexedImage(image.name, image.ref, image.source, "1", image.captions[1:], taken=image.taken)
        images.append((described, hit.id.encode()))
    copy.add(contents, images)
    vectors = [QueryEncoder(model).embed(SearchQuery([query])).combined for query in queries]
    names = [image.name for image, _ in images]
    short = [" ".join(query.split()[1:3]) for query in queries]
    print("| queries | word search | images with a word match | R@1 |\n|---|---|---|---|")
    for label, texts in (("captions", queries), ("two words of a caption", short)):
        if label != "captions":
            vectors = [QueryEncoder(model).embed(SearchQuery([text])).combined for text in texts]
        for name, use_words in (("off", False), ("on", True)):
            correct, matched = [], []
            for text, vector, expected in zip(texts, vectors, names, strict=True):
                hits = copy.search(vector, 1, Filter(), words=[text] if use_words else [])
                correct.append(hits[0].images[0].name == expected)
                matched.append(bool(hits[0].matched))
            print(f"| {label} | {name} | {np.mean(matched):.1%} | {np.mean(correct):.1%} |", flush=True)


if __name__ == "__main__":
    main()
