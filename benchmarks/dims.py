"""Compare ways to make embeddings smaller, and adapters of several depths.

    python benchmarks/dims.py DATA --out runs/dims

DATA contains flickr8k and coco_img, each with a captions.jsonl and images. The models are trained on Flickr8k's
training images and coco_img, and tested on Flickr8k's 1,000 validation images. The caption encoder is
all-MiniLM-L6-v2. The vision tower is a frozen EfficientNet-Lite0 at 160 pixels, so only the heads are trained, on
cached features. The first dimensions of the default model are the principal components of the training captions.
`unrotated` is the same model after a random rotation of its embeddings, which undoes this.

Every model is evaluated with all dimensions and with the first 256, 128 and 64. The table OUT/table.md contains the
mean and the standard deviation over the seeds. To resume an interrupted run, repeat the command.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.io_utils import atomic_path
from llm2clip.models.dual_encoder import open_dual_encoder
from shared import format_mean_std, make_parser, run_llm2clip, write_table

ENCODER = "all-minilm-l6-v2"
DIMS, SEEDS = ("64", "128", "256"), 3
MODELS = {
    "default": [],
    "matryoshka": ["--align.matryoshka_dims", "[64, 128, 256]"],
    "depth-0": ["--align.adapter_depth", "0"],  # has the encoder's 384 dimensions
    "depth-1-384": ["--align.embed_dim", "384"],  # for comparison with depth-0
    "depth-4": ["--align.adapter_depth", "4"],
}
FROZEN = ["--align.image_size", "160", "--align.tower_lr", "0", "--align.epochs", "10", "--align.eval_steps", "0"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    flickr, coco = (str(args.data / name / "captions.jsonl") for name in ("flickr8k", "coco_img"))
    out, log = args.out, args.out / "log.txt"
    store, features = str(out / "store"), str(out / "features")
    run_llm2clip(["embed", flickr, coco, "--encoder.path", ENCODER, "--out", store], log)
    for seed in range(SEEDS):
        folder = out / f"seed-{seed}"
        for name, flags in MODELS.items():
            if not (folder / name / "model").exists():
                sources = ["align", f"{flickr}@train+none", coco, "--store", store, "--encoder.path", ENCODER]
                run = [*FROZEN, *flags, "--align.seed", str(seed), "--features", features, "--out", str(folder / name)]
                run_llm2clip([*sources, *run], log)
        if not (folder / "unrotated.npz").exists():
            write_rotated_embeddings(folder / "default/model", flickr, folder / "unrotated.npz")
        first, *others = [str(folder / name / "model") for name in MODELS]
        command = ["evaluate", first, f"{flickr}@val", "--dims", *DIMS, "--out", str(folder / "evaluate")]
        run_llm2clip([*command, "--baselines", str(folder / "unrotated.npz"), *others], log)
    rows = summarize([out / f"seed-{seed}" / "evaluate/results.json" for seed in range(SEEDS)])
    write_table(out / "table.md", ["model", "dimensions", "T2I R@1"], rows)


def write_rotated_embeddings(model: Path, flickr: str, file: Path) -> None:
    """Write the model's embeddings of the validation split, rotated randomly. This does not change similarities."""
    embeddings = ModelEmbeddings(open_dual_encoder(str(model)), SkipLog())
    records = [record for record in open_records(flickr) if record.split == "val" and record.image is not None]
    refs = [record.image for record in records]
    images, indices = embeddings.encode_images(refs)
    captions = list(dict.fromkeys(caption for record in records for caption in record.captions))
    texts = embeddings.encode_texts(captions)
    dim = images.shape[1]
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))).Q  # (D, D)
    arrays = {"images": (images @ rotation).numpy(), "texts": (texts @ rotation).numpy()}
    names = [str(refs[i]) for i in indices]
    with atomic_path(file) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays, image_names=names, captions=captions)


def summarize(files: list[Path]) -> list[list[str]]:
    """Return a table row with T2I R@1 for each model and number of dimensions."""
    recalls: dict[tuple[str, int], list[float]] = defaultdict(list)
    names = [next(iter(MODELS)), "unrotated", *list(MODELS)[1:]]  # in the order in which `evaluate` lists the models
    for file in files:
        results = json.loads(file.read_text())["results"]
        full_models = list(dict.fromkeys(result["full model"] for result in results))
        for result in results:
            name = names[full_models.index(result["full model"])]
            recalls[name, result["dimensions"]].append(result["rows"][0]["T2I"]["R@1"])
    return [[name, str(dim), format_mean_std(values)] for (name, dim), values in recalls.items()]


if __name__ == "__main__":
    main()
