"""Measure the speed of decoding and cropping training images, compared with Pillow and torchvision transforms.

    python benchmarks/images.py FOLDER [--count 300]

FOLDER contains image files. Both methods use one thread and the same crops.
"""

import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from llm2clip.data.formats import IMAGE_SUFFIXES, list_files_with_suffixes
from llm2clip.data.images import load_image
from llm2clip.data.transforms import PreprocessConfig, TrainTransform, _sample_crop_box
from shared import format_median, make_parser, print_header, print_row

SIZE, REPEATS = 224, 3
MEAN = STD = (0.5, 0.5, 0.5)
TRANSFORM = TrainTransform(PreprocessConfig(SIZE, "shortest", 1.0, "bicubic", MEAN, STD))


def load_with_llm2clip(path: str, seed: int) -> torch.Tensor:
    """Return a decoded and cropped image of shape (3, S, S), uint8."""
    return TRANSFORM(load_image(path), torch.Generator().manual_seed(seed))


def load_with_pillow(path: str, seed: int) -> torch.Tensor:
    """Return a normalised image of shape (3, S, S), float32, prepared as in most training code."""
    image = Image.open(path).convert("RGB")
    crop = _sample_crop_box(image.height, image.width, torch.Generator().manual_seed(seed))
    image = functional.resized_crop(image, *crop, [SIZE, SIZE], transforms.InterpolationMode.BICUBIC)
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of image files")
    parser.add_argument("--count", type=int, default=300, help="maximum number of images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [str(path) for path in list_files_with_suffixes(str(args.folder), IMAGE_SUFFIXES)][: args.count]
    differences = []
    for seed, path in enumerate(paths):
        reference = load_with_pillow(path, seed) * 0.5 + 0.5  # undo MEAN and STD
        differences.append((load_with_llm2clip(path, seed) / 255 - reference).abs())
    rates: dict[str, list[float]] = {"Pillow and torchvision": [], "llm2clip": []}
    for _ in range(REPEATS):
        for method, load in zip(rates, (load_with_pillow, load_with_llm2clip), strict=True):
            start = time.perf_counter()
            for seed, path in enumerate(paths):
                load(path, seed)
            rates[method].append(len(paths) / (time.perf_counter() - start))
    print_header("images/s", *rates)
    print_row(args.folder, *map(format_median, rates.values()))
    mean, maximum = (torch.stack(differences).mean(), torch.stack(differences).max())
    print(f"\ndifference between the pixels, scaled to [0, 1]: {mean:.5f} (mean), {maximum:.4f} (maximum)")


if __name__ == "__main__":
    main()
