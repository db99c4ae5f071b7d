"""Measure the cosine similarity between photographs, edited copies and neighbouring frames, to choose thresholds.

    python benchmarks/similar.py DATA/flickr8k/images MODEL [MODEL ...]

The first 200 images of the folder are embedded, together with edited copies of each: scaled to half the size, saved as
JPEG with quality 40, cropped by 5%, and brightened by 20%. In place of the frames of a burst, two crops of each image
are compared: without the left and upper tenth, and without the right and lower tenth. The tables show how many pairs of
each kind have at least a given similarity, and how many of the pairs of different photographs do. In the first table,
the mean embedding of the images is subtracted. `src/llm2clip/search/query.py` contains the thresholds of searches.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder

COUNT, BATCH_SIZE = 200, 32
THRESHOLDS = (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.875, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("models", nargs="+", type=str)
    args = parser.parse_args()
    files = sorted(args.images.glob("*.jpg"))[:COUNT]
    if len(files) < COUNT:
        raise SystemExit(f"{args.images} contains {len(files)} JPEG files; {COUNT} are needed")
    variants: dict[str, list[bytes]] = {}
    for file in files:
        with Image.open(file) as image:
            for name, data in edit(image.convert("RGB")).items():
                variants.setdefault(name, []).append(data)
    for name in args.models:
        model = open_dual_encoder(name)
        vectors = {kind: embed(model, images) for kind, images in variants.items()}
        mean = vectors["original"].mean(axis=0)
        centred = {kind: normalize(values - mean) for kind, values in vectors.items()}
        print(f"{name}, centred\n\n{make_table(centred)}\n\n{name}, not centred\n\n{make_table(vectors)}\n")


def edit(image: Image.Image) -> dict[str, bytes]:
    """Return an image and its variants as encoded files, keyed by their kind."""
    width, height = image.size
    dx, dy = width // 20, height // 20
    return {
        "original": encode(image),
        "half size": encode(image.resize((width // 2, height // 2))),
        "JPEG quality 40": encode(image, 40),
        "crop of 5%": encode(image.crop((dx // 2, dy // 2, width - dx + dx // 2, height - dy + dy // 2))),
        "20% brighter": encode(ImageEnhance.Brightness(image).enhance(1.2)),
        "frame 1": encode(image.crop((2 * dx, 2 * dy, width, height))),
        "frame 2": encode(image.crop((0, 0, width - 2 * dx, height - 2 * dy))),
    }


def encode(image: Image.Image, quality: int = 95) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def embed(model: DualEncoder, images: list[bytes]) -> np.ndarray:
    """Return the embeddings of encoded images, of shape (N, D)."""
    chunks = []
    for start in range(0, len(images), BATCH_SIZE):
        batch = [model.transform(load_image(data)) for data in images[start : start + BATCH_SIZE]]
        chunks.append(model.encode_images(batch).numpy())
    return np.concatenate(chunks)


def normalize(vectors: np.ndarray) -> np.ndarray:
    normalized: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return normalized


def make_table(vectors: dict[str, np.ndarray]) -> str:
    """Return a Markdown table with the percentage of pairs above each threshold. Embeddings have shape (N, D)."""
    original = vectors["original"]
    pairs = {}
    for kind in ("half size", "JPEG quality 40", "crop of 5%", "20% brighter"):
        pairs[kind] = (vectors[kind] * original).sum(axis=1)
    pairs["frames"] = (vectors["frame 1"] * vectors["frame 2"]).sum(axis=1)
    pairs["different photographs"] = (original @ original.T)[np.triu_indices(len(original), 1)]
    lines = ["| similarity | " + " | ".join(pairs) + " |", "|" + "---|" * (len(pairs) + 1)]
    for threshold in THRESHOLDS:
        shares = [f"{100 * np.mean(cosines >= threshold):.3g}%" for cosines in pairs.values()]
        lines.append(f"| {threshold} | " + " | ".join(shares) + " |")
    lines.append("| lowest | " + " | ".join(f"{cosines.min():.3f}" for cosines in pairs.values()) + " |")
    lines.append("| highest | " + " | ".join(f"{cosines.max():.3f}" for cosines in pairs.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
