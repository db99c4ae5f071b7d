"""Train a small CLIP model, and measure how much `align` changes its image features.

    python benchmarks/inheritance.py make DATA/flickr8k/captions.jsonl@train+none DATA/coco_img/captions.jsonl \\
        --out CLIP
    llm2clip align ... --align.tower timm:CLIP --align.inherit true --out RUN
    python benchmarks/inheritance.py drift RUN/model --clip CLIP --images DATA/flickr8k/captions.jsonl@val

`make` writes an open_clip model whose image tower is a frozen EfficientNet-Lite0. Its text tower and image projection
are trained from scratch with open_clip's loss, on captions and on the short phrases in the captions. The folder also
contains the image tower in timm's format, as in EVA-CLIP's repositories.

`drift` prints the mean cosine similarity between the features of the model's tower and of the CLIP model's tower.
"""

import argparse
import json
import math
import random
from itertools import chain
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from llm2clip.data.noun_phrases import add_noun_phrases
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.precision import FP32
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.store.encode import TowerEncoder, store_image_features
from llm2clip.store.layout import make_image_keys
from shared import make_parser, print_header, print_row

EMBED_DIM, IMAGE_SIZE, EPOCHS = 256, 160, 15
TEXT_TOWER = {"context_length": 24, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3}
BATCH_SIZE, LR, WEIGHT_DECAY, WARMUP_STEPS = 256, 1e-3, 0.2, 100
PHRASE_RATE = 0.5  # probability of training on a phrase instead of a caption


def main() -> None:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make", help="train a small CLIP model")
    make.add_argument("sources", nargs="+")
    make.add_argument("--out", type=Path, required=True)
    make.set_defaults(run=make_clip)
    drift = commands.add_parser("drift", help="compare image features with those of the CLIP model")
    drift.add_argument("models", nargs="*", type=Path)
    drift.add_argument("--clip", type=Path, required=True)
    drift.add_argument("--images", required=True, help="source of the images, such as captions.jsonl@val")
    drift.set_defaults(run=measure_drift)
    args = parser.parse_args()
    args.run(args)


def make_clip(args: argparse.Namespace) -> None:
    table = RecordTable.from_records(chain.from_iterable(map(open_records, args.sources)))
    records = list(add_noun_phrases(table))
    args.out.mkdir(parents=True, exist_ok=True)
    tower = VisionTower.from_pretrained("efficientnet-lite0", image_size=IMAGE_SIZE)
    features = compute_image_features(tower, records, args.out / "features")
    write_configs(args.out)
    torch.manual_seed(0)
    clip: Any = open_clip.create_model(f"local-dir:{args.out}", load_weights=False)
    clip.visual.trunk.load_state_dict(load_headless_weights())
    train(clip, open_clip.get_tokenizer(f"local-dir:{args.out}"), records, features)
    save_file(clip.state_dict(), args.out / "open_clip_model.safetensors")
    save_file(clip.visual.trunk.state_dict(), args.out / "model.safetensors")


def compute_image_features(tower: VisionTower, records: list[Record], folder: Path) -> Tensor:
    """Return the tower's features of all N images as a float32 tensor of shape (N, feature_dim)."""
    encoder = TowerEncoder(tower, FP32)
    refs = [record.image for record in records if record.image is not None]
    store = store_image_features(refs, encoder, encoder.identity(), folder, SkipLog())
    return torch.from_numpy(store.take(store.find_keys(make_image_keys(refs))))


def load_headless_weights() -> dict[str, Tensor]:
    """Return the weights of EfficientNet-Lite0 without its ImageNet classifier."""
    weights = load_file(Path(resolve_pretrained_name("efficientnet-lite0")) / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}


def write_configs(folder: Path) -> None:
    """Write the configs of the open_clip model and of its image tower."""
    architecture = "tf_efficientnet_lite0"
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    vision = {"timm_model_name": architecture, "timm_pool": "avg", "timm_proj": "linear", "image_size": IMAGE_SIZE}
    model = {"embed_dim": EMBED_DIM, "vision_cfg": vision, "text_cfg": TEXT_TOWER, "custom_text": True}
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    size = {"input_size": [3, IMAGE_SIZE, IMAGE_SIZE], "crop_pct": 1.0, "num_classes": 0, "classifier": "classifier"}
    timm_config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": size | preprocess}
    (folder / "config.json").write_text(json.dumps(timm_config))


def train(clip: Any, tokenizer: Any, records: list[Record], features: Tensor) -> None:
    """Train the text tower and the image projection on the features of the frozen image tower."""
    trained = [p for name, p in clip.named_parameters() if not name.startswith("visual.trunk.")]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))
    steps_per_epoch = len(records) // BATCH_SIZE
    steps = EPOCHS * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=WARMUP_STEPS / steps)
    loss, rng = ClipLoss(), random.Random(0)
    order = list(range(len(records)))
    for epoch in range(EPOCHS):
        rng.shuffle(order)
        for step in tqdm(range(steps_per_epoch), desc=f"epoch {epoch + 1}"):
            batch = order[step * BATCH_SIZE :][:BATCH_SIZE]
            texts = tokenizer([sample_text(records[i], rng) for i in batch])
            images = F.normalize(clip.visual.head(features[batch]), dim=-1)
            loss(images, clip.encode_text(texts, normalize=True), clip.logit_scale.exp()).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            with torch.no_grad():
                clip.logit_scale.clamp_(max=math.log(100))


def sample_text(record: Record, rng: random.Random) -> str:
    """Return a random phrase with probability `PHRASE_RATE` (if the image has phrases), or else a random caption."""
    phrases = record.phrases if rng.random() < PHRASE_RATE else ()
    return rng.choice(phrases or record.captions)


@torch.inference_mode()
def measure_drift(args: argparse.Namespace) -> None:
    records = list(open_records(args.images))
    pretrained = VisionTower.from_pretrained(f"timm:{args.clip}")
    before = compute_image_features(pretrained, records, args.clip / "drift-features")
    print_header("model", "cosine similarity")
    for path in args.models:
        model = LLM2CLIP.from_pretrained(path)
        after = compute_image_features(model.tower, records, path.parent / "drift-features")
        print_row(path, f"{F.cosine_similarity(before, after).mean():.3f}")


if __name__ == "__main__":
    main()
