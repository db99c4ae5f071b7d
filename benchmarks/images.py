"""Measure the speed of decoding and cropping training images, compared with Pillow and torchvision transforms.

    python benchmarks/images.py FOLDER [--size 224] [--count 512] [--repeats 3]

FOLDER contains image files. Both pipelines use one thread and the same crops. The script also prints the difference
between the pixels of the two pipelines, scaled to [0, 1].
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from llm2clip.data.formats import IMAGE_SUFFIXES, list_files
from llm2clip.data.images import load_image
from llm2clip.data.transforms import Preprocess, TrainTransform

MEAN = STD = (0.5, 0.5, 0.5)
Crop = tuple[int, int, int, int]  # top, left, height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of image files")
    parser.add_argument("--size", type=int, default=224, help="side length of the cropped images, in pixels")
    parser.add_argument("--count", type=int, default=512, help="maximum number of images")
    parser.add_argument("--repeats", type=int, default=3, help="number of timed repeats")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [Path(path) for path in list_files(str(args.folder), IMAGE_SUFFIXES)][: args.count]
    transform = TrainTransform(Preprocess(args.size, "shortest", 1.0, "bicubic", MEAN, STD))

    def load(index: int) -> torch.Tensor:
        """Return a decoded and cropped image of shape (3, S, S), uint8."""
        return transform(load_image(paths[index]), torch.Generator().manual_seed(index))

    crops = []
    for index, path in enumerate(paths):
        width, height = Image.open(path).size
        crops.append(transform._sample_crop_box(height, width, torch.Generator().manual_seed(index)))

    mean_difference = max_difference = 0.0
    for index, path in enumerate(paths):
        reference = load_with_pillow(path, crops[index], args.size) * 0.5 + 0.5  # undo MEAN and STD
        difference = (load(index) / 255 - reference).abs()
        mean_difference += difference.mean().item() / len(paths)
        max_difference = max(max_difference, difference.max().item())

    pillow_seconds, our_seconds = [], []
    for _ in range(args.repeats):
        start = time.perf_counter()
        for index, path in enumerate(paths):
            load_with_pillow(path, crops[index], args.size)
        middle = time.perf_counter()
        for index in range(len(paths)):
            load(index)
        pillow_seconds.append(middle - start)
        our_seconds.append(time.perf_counter() - middle)

    print(f"{len(paths)} images resized to {args.size} pixels, one thread, median of {args.repeats} repeats")
    for name, seconds in (("Pillow, float32", pillow_seconds), ("llm2clip, uint8", our_seconds)):
        rates = [len(paths) / s for s in seconds]
        print(f"{name}: {statistics.median(rates):.0f} images/s ({min(rates):.0f} to {max(rates):.0f})")
    speed_up = statistics.median(a / b for a, b in zip(pillow_seconds, our_seconds, strict=True))
    print(f"speed-up: {speed_up:.2f}x; pixel difference: {mean_difference:.5f} (mean), {max_difference:.4f} (maximum)")


def load_with_pillow(path: Path, crop: Crop, size: int) -> torch.Tensor:
    """Return a normalised image of shape (3, S, S), float32, prepared as in most training code."""
    image = Image.open(path).convert("RGB")
    image = functional.resized_crop(image, *crop, [size, size], transforms.InterpolationMode.BICUBIC)
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


if __name__ == "__main__":
    main()
