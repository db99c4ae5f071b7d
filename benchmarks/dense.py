"""Measure the speed and memory of dense evaluation on a ViT-B/16 with random weights.

    python benchmarks/dense.py FOLDER [--images 40] [--threads 2]

FOLDER contains JPEG files, which are resized to several sizes (see SIZES).

Segmentation: SCLIP's protocol with 20 classes. The baseline encodes one window at a time, sums the scores for each
pixel of the resized image, and then resizes the scores to the original size. The script prints the percentage of pixels
to which both methods assign the same class.

Regions: ten boxes in each image (of 640 x 480 pixels), embedded from crops and by RoIAlign on the dense features.

Each measurement runs in its own process. The reported memory is the peak memory minus the memory after the model has
encoded eight windows. The script also prints CPU times, which hardly depend on other programs.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.io import write_jpeg
from torchvision.transforms.v2 import functional as transforms

from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform
from llm2clip.evaluate.benchmarks.base import SegmentationData
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.regions import CROP, encode_boxes
from llm2clip.evaluate.segmentation import segment_images
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import build_dense_encoder
from llm2clip.models.vision.vision_tower import VisionTower
from shared import memory_mb, reset_peak_memory

SIZES = ((640, 480), (1280, 960), (2560, 1920), (4000, 3000))  # (width, height) in pixels
LARGE_IMAGES = 2  # number of images for each of the larger sizes
NUM_CLASSES = 20
BOXES_PER_IMAGE = 10
EMBED_DIM = 512
WINDOW, STRIDE, SHORTER_SIDE = 224, 112, 336  # in pixels, as in SCLIP's protocol


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of JPEG files")
    parser.add_argument("--images", type=int, default=40, help="number of images of 640 x 480 pixels")
    parser.add_argument("--threads", type=int, default=2, help="number of threads")
    args = parser.parse_args()
    sources = sorted(args.folder.glob("*.jpg"))[: args.images]
    print(f"{len(sources)} images of 640 x 480 pixels, {LARGE_IMAGES} of each other size, {args.threads} threads")
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for width, height in SIZES:
            count = len(sources) if (width, height) == SIZES[0] else LARGE_IMAGES
            files[width, height] = write_resized(sources[:count], Path(folder), width, height)
        small = files[SIZES[0]]
        for size, images in files.items():
            baseline = run(segment_window_by_window, images, None, args.threads)
            report(f"{size[0]} x {size[1]}, one window at a time", baseline, args.threads)
            measurement = run(segment_with_llm2clip, images, baseline.result, args.threads)
            report(f"{size[0]} x {size[1]}, llm2clip", measurement, args.threads)
            print(f"  {measurement.result:.3f}% of the pixels have the same class", flush=True)
        for method in (CROP, "plain"):
            report(
                f"{BOXES_PER_IMAGE} boxes per image, {method}",
                run(embed_boxes, small, method, args.threads),
                args.threads,
            )


@dataclass
class Measurement:
    """Measurement of a method on several images."""

    wall_seconds: float  # mean per image
    cpu_seconds: float  # mean per image
    memory: float  # additional memory in MB
    result: Any  # return value of the method


def report(name: str, measurement: Measurement, threads: int) -> None:
    """Print a measurement. On a busy machine, the wall time also includes the time spent waiting for the CPU."""
    minutes = 1000 * measurement.cpu_seconds / threads / 60
    print(
        f"{name}: {measurement.cpu_seconds:.2f} s of CPU time per image ({minutes:.0f} minutes for 1,000 images on "
        f"{threads} idle cores), wall time {measurement.wall_seconds:.2f} s, {measurement.memory:.0f} MB",
        flush=True,
    )


def write_resized(sources: Sequence[Path], folder: Path, width: int, height: int) -> list[Path]:
    """Resize images, save them as JPEG files, and return the paths."""
    files = []
    for source in sources:
        file = folder / f"{source.stem}-{width}.jpg"
        write_jpeg(transforms.resize(load_image(source), [height, width], antialias=True), str(file), quality=90)
        files.append(file)
    return files


def run(method: Callable[..., Any], files: Sequence[Path], argument: Any, threads: int) -> Measurement:
    """Run a method in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, method, files, argument, threads).result()


def measure(method: Callable[..., Any], files: Sequence[Path], argument: Any, threads: int) -> Measurement:
    torch.set_num_threads(threads)
    model = build_model()
    model.dense.encode(torch.zeros(8, 3, WINDOW, WINDOW))  # allocates memory that every method needs
    memory = reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    result = method(model, files, argument)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Measurement(wall / len(files), cpu / len(files), memory_mb("VmHWM") - memory, result)


def build_model() -> DualEncoder:
    """Return a ViT-B/16 with random weights, and a text encoder that returns random embeddings."""
    torch.manual_seed(0)
    tower = VisionTower.from_pretrained("timm:vit_base_patch16_clip_224", pretrained=False)
    projection = nn.Linear(tower.feature_dim, EMBED_DIM, bias=False)
    return DualEncoder(
        name="ViT-B/16",
        embed_dim=EMBED_DIM,
        identity=dict,
        transform=EvalTransform(tower.preprocess),
        encode_images_raw=lambda images: projection(tower(torch.stack(images))),
        encode_texts_raw=lambda texts, _: torch.randn(
            len(texts), EMBED_DIM, generator=torch.Generator().manual_seed(0)
        ),
        dense=build_dense_encoder(tower, projection),
    )


def segment_with_llm2clip(model: DualEncoder, files: Sequence[Path], labels: Sequence[np.ndarray]) -> float:
    """Segment images, and return the percentage of pixels whose predicted class equals their label."""
    names = [(f"class {n}",) for n in range(NUM_CLASSES)]
    data = SegmentationData([FileImage(str(file)) for file in files], labels.__getitem__, names, ["{}"])
    embeddings = ModelEmbeddings(model, SkipLog(), progress=False)
    counts = segment_images(data, embeddings, ["plain"]).counts["plain"]
    return 100 * counts.intersection.sum() / counts.labelled.sum()


@torch.no_grad()
def segment_window_by_window(model: DualEncoder, files: Sequence[Path], _: None) -> list[np.ndarray]:
    """Segment images. Return the class of each pixel of each image, as uint8 arrays of shape (H, W)."""
    queries = model.encode_texts([f"class {n}" for n in range(NUM_CLASSES)])
    results = []
    for file in files:
        image = load_image(file)
        resized = transforms.resize(image, [SHORTER_SIDE], antialias=True)
        height, width = resized.shape[1:]
        sums, counts = torch.zeros(NUM_CLASSES, height, width), torch.zeros(height, width)
        for row in range(0, height - WINDOW + STRIDE, STRIDE):
            for column in range(0, width - WINDOW + STRIDE, STRIDE):
                top, left = min(row, height - WINDOW), min(column, width - WINDOW)
                window = resized[:, top : top + WINDOW, left : left + WINDOW]
                scores = (model.dense.encode(window[None]) @ queries.T).permute(0, 3, 1, 2)  # (1, classes, h, w)
                part = (slice(top, top + WINDOW), slice(left, left + WINDOW))
                sums[:, *part] += F.interpolate(scores, (WINDOW, WINDOW), mode="bilinear")[0]
                counts[part] += 1
        logits = F.interpolate((sums / counts)[None], image.shape[1:], mode="bilinear")[0]
        results.append(logits.argmax(0).to(torch.uint8).numpy())
    return results


def embed_boxes(model: DualEncoder, files: Sequence[Path], method: str) -> None:
    """Embed random boxes whose sides are a tenth to a half as long as the image's sides."""
    generator = torch.Generator().manual_seed(0)
    for file in files:
        image = load_image(file)
        size = torch.tensor([image.shape[2], image.shape[1]])
        corners = torch.rand(BOXES_PER_IMAGE, 2, generator=generator) * 0.5 * size
        sides = (0.1 + 0.4 * torch.rand(BOXES_PER_IMAGE, 2, generator=generator)) * size
        encode_boxes(model, [image], [torch.cat([corners, corners + sides], 1)], method)


if __name__ == "__main__":
    main()
