"""Decoding and cropping for training, against the classic pipeline of Pillow and torchvision's first transforms.

    python benchmarks/images.py PICTURES [--size 224] [--count 512] [--turns 3]

PICTURES is a folder of image files. Both get the same crops. One thread; the pixels are compared as 0 to 1.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from llm2clip.data.images import Preprocess, TrainTransform, load_image
from llm2clip.data.readers.tar import list_images

MEAN = STD = (0.5, 0.5, 0.5)


def classic(path: Path, crop: tuple[int, int, int, int], size: int) -> torch.Tensor:
    """Normalised float32 (3, S, S), as most training code makes it."""
    image = Image.open(path).convert("RGB")
    cut = functional.resized_crop(image, *crop, [size, size], transforms.InterpolationMode.BICUBIC)
    return functional.normalize(functional.to_tensor(cut), MEAN, STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    paths = [Path(path) for path in list_images(str(given.pictures))][: given.count]
    transform = TrainTransform(Preprocess(given.size, "shortest", 1.0, "bicubic", MEAN, STD))

    def ours(n: int) -> torch.Tensor:
        return transform(load_image(paths[n]), torch.Generator().manual_seed(n))

    crops = []
    for n, path in enumerate(paths):  # those that ours draws
        width, height = Image.open(path).size
        crops.append(transform._crop(height, width, torch.Generator().manual_seed(n)))
    worst = mean = 0.0
    for n, path in enumerate(paths):
        difference = (ours(n) / 255 - (classic(path, crops[n], given.size) * 0.5 + 0.5)).abs()
        worst, mean = max(worst, difference.max().item()), mean + difference.mean().item() / len(paths)
    seconds: list[tuple[float, float]] = []
    for _ in range(given.turns):
        start = time.perf_counter()
        for n, path in enumerate(paths):
            classic(path, crops[n], given.size)
        middle = time.perf_counter()
        for n in range(len(paths)):
            ours(n)
        seconds.append((middle - start, time.perf_counter() - middle))
    rates = [[len(paths) / s for s in some] for some in zip(*seconds, strict=True)]
    ratio = statistics.median(a / b for a, b in seconds)
    print(f"{len(paths)} pictures to {given.size} pixels, one thread, median of {given.turns} turns")
    for name, some in zip(("Pillow, float32", "here, uint8"), rates, strict=True):
        print(f"{name}: {statistics.median(some):.0f} images/s ({min(some):.0f} to {max(some):.0f})")
    print(f"{ratio:.2f}x; pixels differ by {mean:.5f} in the mean, {worst:.4f} at most")


if __name__ == "__main__":
    main()
