"""Fine-tune an object detector on a vision tower, and evaluate it with pycocotools. See README.md."""

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from jsonargparse import auto_cli
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import horizontal_flip
from torchvision.tv_tensors import BoundingBoxes, Mask

from backbones import build_backbone
from llm2clip import LLM2CLIP
from llm2clip.data.images import load_image
from llm2clip.io_utils import atomic_path, atomic_write_text
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import is_distributed, process_state, shut_down_process_group


@dataclass
class Config:
    """Settings of a run. README.md explains them."""

    model: str
    data: Path
    out: Path
    train_tower: bool = True
    masks: bool = True
    image_size: int = 800
    max_size: int = 1344
    steps: int = 90_000
    batch_size: int = 16
    lr: float = 1e-4
    weight_decay: float = 0.1
    layer_decay: float = 0.7
    warmup_steps: int = 250
    bf16: bool = True
    gradient_checkpointing: bool = False
    save_steps: int = 2_000
    workers: int = 4
    seed: int = 0


def build_detector(config: Config, num_classes: int) -> nn.Module:
    """Return torchvision's detector for `num_classes` classes, without counting the background, on the CPU."""
    if is_model_folder(config.model):
        tower = LLM2CLIP.from_pretrained(config.model, "cpu").tower
    else:
        tower = VisionTower.from_pretrained(config.model)
    tower.requires_grad_(config.train_tower)
    if config.gradient_checkpointing:
        tower.set_grad_checkpointing()
    detector = MaskRCNN if config.masks else FasterRCNN
    return detector(
        build_backbone(tower, config.bf16),
        num_classes + 1,  # and the background
        min_size=config.image_size,
        max_size=config.max_size,
        image_mean=[0.0] * 3,  # the tower normalises the images
        image_std=[1.0] * 3,
    )


class CocoImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images of a COCO file, as float (3, H, W) from 0 to 1, with torchvision's targets. Crowds are omitted."""

    def __init__(self, data: Path, split: str, only_annotated: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(data / "annotations" / f"instances_{split}.json"))
        self.folder = data / split
        self.category_ids = sorted(self.coco.getCatIds())
        self.image_ids = sorted(self.coco.getImgIds())
        if only_annotated:
            self.image_ids = [image_id for image_id in self.image_ids if self._objects(image_id)]

    def _objects(self, image_id: int) -> list[dict[str, Any]]:
        rows = self.coco.loadAnns(self.coco.getAnnIds(image_id, iscrowd=False))
        return [row for row in rows if min(row["bbox"][2:]) >= 1]

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image_id = self.image_ids[index]
        image = load_image(self.folder / self.coco.imgs[image_id]["file_name"])
        rows = self._objects(image_id)
        size = image.shape[-2:]
        boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32).reshape(-1, 4)
        masks = [torch.from_numpy(self.coco.annToMask(row)) for row in rows]
        target = {
            "image_id": image_id,
            "boxes": BoundingBoxes(box_convert(boxes, "xywh", "xyxy"), format="XYXY", canvas_size=size),
            "labels": torch.tensor(
                [self.category_ids.index(row["category_id"]) + 1 for row in rows], dtype=torch.int64
            ),
            "masks": Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8)),
        }
        return image.float() / 255, target


def batches(num_images: int, config: Config, start: int, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
    """Yield the image indices of a rank for each step from `start`. They do not depend on where a run started."""
    epoch, order = -1, torch.empty(0)
    for step in range(start, config.steps):
        batch = []
        for n in range(step * config.batch_size, (step + 1) * config.batch_size):
            if n // num_images != epoch:
                epoch = n // num_images
                order = torch.randperm(num_images, generator=torch.Generator().manual_seed(config.seed + epoch))
            batch.append(int(order[n % num_images]))
        yield batch[rank::world]


def make_parameter_groups(model: Any, config: Config) -> list[dict[str, Any]]:
    """Return parameter groups for AdamW with layer-wise learning rate decay. Vectors have no weight decay."""
    tower: VisionTower = model.backbone.tower
    depths = {id(tower.get_parameter(name)): depth for name, depth in tower.get_parameter_depths().items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            layers_above = tower.num_layers - depths.get(id(parameter), tower.num_layers)
            weight_decay = config.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((config.layer_decay**layers_above, weight_decay), []).append(parameter)
    return [{"params": p, "scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def learning_rate(step: int, config: Config) -> float:
    """Return the learning rate at a step: linear warm-up, then ViTDet's step decay."""
    drops = (step >= config.steps * 8 // 9) + (step >= config.steps * 26 // 27)
    return config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps)) * 0.1**drops


def train(model: nn.Module, dataset: CocoImages, config: Config) -> None:
    """Train the detector, and append the loss of each step to RUN/log.jsonl."""
    state = process_state()
    rank, world, device = state.process_index, state.num_processes, state.device
    optimizer = torch.optim.AdamW(make_parameter_groups(model, config), lr=config.lr)
    checkpoint, start = config.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    # The tower's pooling and projection do not contribute to the loss.
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    wrapped.train()
    sampler = list(batches(len(dataset), config, start, rank, world))
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=config.workers, collate_fn=list)
    bar = ProgressBar(loader, desc="train", unit="step", disable=rank > 0, initial=start, total=config.steps)
    for step, batch in enumerate(bar, start):
        torch.manual_seed((config.seed * config.steps + step) * world + rank)  # a resumed run draws the same samples
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["scale"]
        images, targets = [], []
        for image, target in batch:
            if torch.rand(1) < 0.5:
                image = horizontal_flip(image)
                target |= {key: horizontal_flip(target[key]) for key in ("boxes", "masks")}
            images.append(image.to(device))
            targets.append({key: target[key].to(device) for key in ("boxes", "labels", "masks")})
        losses = wrapped(images, targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {step}: lower --lr (it is {config.lr})")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            row = {"step": step, "loss": loss.item(), **{name: value.item() for name, value in losses.items()}}
            with (config.out / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
            if (step + 1) % config.save_steps == 0 or step + 1 == config.steps:
                with atomic_path(checkpoint) as file:
                    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                    torch.save(saved, file)


@torch.inference_mode()
def evaluate(model: nn.Module, dataset: CocoImages, config: Config) -> dict[str, float]:
    """Return COCO's AP, AP50 and AP75 of boxes ("bbox AP") and masks ("segm AP"). Each rank takes some images."""
    state = process_state()
    model.eval()
    results: list[dict[str, Any]] = []
    indices = range(state.process_index, len(dataset), state.num_processes)
    for index in ProgressBar(indices, desc="evaluate", unit="image", disable=not state.is_main_process):
        image, target = dataset[index]
        [output] = model([image.to(state.device)])
        output = {key: value.cpu() for key, value in output.items()}
        boxes = box_convert(output["boxes"], "xyxy", "xywh").tolist()
        for n, (box, label, score) in enumerate(zip(boxes, output["labels"], output["scores"], strict=True)):
            category_id = dataset.category_ids[int(label) - 1]
            row = {"image_id": target["image_id"], "category_id": category_id, "bbox": box, "score": float(score)}
            if config.masks:
                mask = (output["masks"][n, 0] >= 0.5).numpy().astype("uint8", order="F")
                row["segmentation"] = coco_mask.encode(mask)
            results.append(row)
    if is_distributed():
        results = gather_object(results)
    metrics = {}
    for kind in ("bbox", "segm") if config.masks else ("bbox",):
        with contextlib.redirect_stdout(io.StringIO()):
            predictions = dataset.coco.loadRes(results) if results else COCO()
            evaluator = COCOeval(dataset.coco, predictions, kind)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        for name, value in zip(("AP", "AP50", "AP75"), evaluator.stats, strict=False):
            metrics[f"{kind} {name}"] = 100 * float(value)
    return metrics


def main(config: Config) -> None:
    state = process_state()
    if config.batch_size % state.num_processes:
        raise ValueError(
            f"--batch_size must be a multiple of the {state.num_processes} processes (got {config.batch_size})"
        )
    config.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    dataset = CocoImages(config.data, "train2017", only_annotated=True)
    model = build_detector(config, len(dataset.category_ids)).to(state.device)
    train(model, dataset, config)
    metrics = evaluate(model, CocoImages(config.data, "val2017", only_annotated=False), config)
    if state.is_main_process:
        atomic_write_text(config.out / "results.json", json.dumps(metrics, indent=1))
        print("  ".join(f"{name} {value:.1f}" for name, value in metrics.items()))
    shut_down_process_group()


if __name__ == "__main__":
    main(auto_cli(Config, as_positional=False))
