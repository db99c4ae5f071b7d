"""The detection example at toy scale: training, resuming, evaluation, and its feature pyramids."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from conftest import make_tower, run_distributed

EXAMPLE = Path(__file__).parents[1] / "examples" / "detection"
COLOURS = ("red", "blue")


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_example(monkeypatch)


def import_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the example with fewer channels and boxes, because the tests run on CPUs."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import backbones
    import finetune

    monkeypatch.setattr(backbones, "CHANNELS", 16)
    sizes = {"box_batch_size_per_image": 16, "rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 16}
    for name in ("FasterRCNN", "MaskRCNN"):
        monkeypatch.setattr(finetune, name, partial(getattr(finetune, name), **sizes, box_detections_per_img=4))
    return finetune


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Folder in COCO's format: a red or blue rectangle on each image, a crowd, and an image without objects."""
    for split, count in (("train2017", 6), ("val2017", 3)):
        images, annotations = [], []
        (tmp_path / "coco" / split).mkdir(parents=True)
        for n in range(count):
            image = Image.new("RGB", (96, 64), "white")
            left, top, width, height = 8 * n, 4 * n, 40, 30
            ImageDraw.Draw(image).rectangle([left, top, left + width - 1, top + height - 1], fill=COLOURS[n % 2])
            image.save(tmp_path / "coco" / split / f"{n}.png")
            images.append({"id": 50 + n, "file_name": f"{n}.png", "width": 96, "height": 64})
            right, bottom = left + width, top + height
            polygon = [left, top, right, top, right, bottom, left, bottom]
            row = {"image_id": 50 + n, "category_id": 7 + n % 2, "bbox": [left, top, width, height]}
            annotations.append({**row, "id": n + 1, "segmentation": [polygon], "area": width * height, "iscrowd": 0})
        crowd = {"counts": [0, 96 * 64], "size": [64, 96]}
        annotations.append({**row, "id": 100, "segmentation": crowd, "area": 96 * 64, "iscrowd": 1})
        images.append({"id": 90, "file_name": "0.png", "width": 96, "height": 64})
        content = {"images": images, "annotations": annotations}
        content["categories"] = [{"id": 7, "name": "red"}, {"id": 8, "name": "blue"}]
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return tmp_path / "coco"


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tower(tmp_path_factory.mktemp("tower"), "test_vit")


def make_config(finetune: Any, tower: Path, coco: Path, out: Path, **changes: Any) -> Any:
    settings = {
        "steps": 4, "batch_size": 2, "image_size": 64, "max_size": 96, "lr": 1e-3, "warmup_steps": 1, "bf16": False,
        "save_steps": 2, "workers": 0, "masks": False,
    }  # fmt: skip
    return finetune.Config(str(tower), coco, out, **settings | changes)


def read_losses(out: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def test_resumed_training_equals_uninterrupted_training(
    finetune: Any, tower: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune.main(make_config(finetune, tower, coco, tmp_path / "full"))
    results = json.loads((tmp_path / "full" / "results.json").read_text())
    assert set(results) == {"bbox AP", "bbox AP50", "bbox AP75"}

    save, saved = torch.save, []

    def stop_after_first_checkpoint(*args: Any) -> None:
        if saved:
            raise KeyboardInterrupt
        saved.append(save(*args))

    config = make_config(finetune, tower, coco, tmp_path / "interrupted")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("torch.save", stop_after_first_checkpoint)
        finetune.main(config)
    finetune.main(config)
    assert read_losses(config.out) == read_losses(tmp_path / "full")
    assert json.loads((config.out / "results.json").read_text()) == results


def run_on_rank(tower: Path, coco: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        finetune = import_example(monkeypatch)
        finetune.main(make_config(finetune, tower, coco, out, steps=2))


def test_two_processes_train_and_evaluate_one_model(tower: Path, coco: Path, tmp_path: Path) -> None:
    run_distributed(2, run_on_rank, tower, coco, tmp_path / "out")
    assert list(read_losses(tmp_path / "out")) == [0, 1]  # a single rank writes the log
    assert "bbox AP50" in json.loads((tmp_path / "out" / "results.json").read_text())


def test_training_reduces_the_loss_and_evaluates_masks(
    finetune: Any, tower: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune.main(
        make_config(finetune, tower, coco, tmp_path / "out", masks=True, steps=12, lr=5e-3, train_tower=False)
    )
    losses = list(read_losses(tmp_path / "out").values())
    assert sum(losses[-3:]) / 3 < losses[0] / 2
    assert {"bbox AP", "segm AP", "segm AP50"} < set(json.loads((tmp_path / "out" / "results.json").read_text()))
    assert "segm AP75" in capsys.readouterr().out


def test_frozen_tower_has_no_gradients_and_layer_decay_scales_the_learning_rate(
    finetune: Any, tower: Path, coco: Path, tmp_path: Path
) -> None:
    config = make_config(finetune, tower, coco, tmp_path, layer_decay=0.5)
    model = finetune.build_detector(config, 2)
    scales = {}
    for group in finetune.make_parameter_groups(model, config):
        scales |= {id(parameter): group["scale"] for parameter in group["params"]}
    vision = model.backbone.tower
    depths = vision.get_parameter_depths()
    for name, depth in depths.items():
        assert scales[id(vision.get_parameter(name))] == 0.5 ** (vision.num_layers - depth)
    assert scales[id(model.roi_heads.box_predictor.cls_score.weight)] == 1
    frozen = finetune.build_detector(make_config(finetune, tower, coco, tmp_path, train_tower=False), 2)
    names = {name for name, parameter in frozen.named_parameters() if parameter.requires_grad}
    assert names and not any("tower" in name for name in names)


def test_batches_cover_every_image_and_do_not_depend_on_the_start(
    finetune: Any, tower: Path, coco: Path, tmp_path: Path
) -> None:
    config = make_config(finetune, tower, coco, tmp_path, steps=10, batch_size=4)
    full = list(finetune.batches(5, config, 0))
    assert list(finetune.batches(5, config, 7)) == full[7:]
    order = [index for batch in full for index in batch]
    for epoch in range(8):
        assert sorted(order[5 * epoch : 5 * epoch + 5]) == list(range(5))
    ranks = [finetune.batches(5, config, 0, rank, world=2) for rank in range(2)]
    for batch, first, second in zip(full, *ranks, strict=True):
        assert sorted(batch) == sorted(first + second)


def test_dataset_omits_crowds_and_unannotated_images(finetune: Any, coco: Path) -> None:
    dataset = finetune.CocoImages(coco, "train2017", only_annotated=True)
    assert dataset.image_ids == [50, 51, 52, 53, 54, 55]
    assert len(finetune.CocoImages(coco, "train2017", only_annotated=False)) == 7
    image, target = dataset[5]
    assert image.shape == (3, 64, 96) and image.max() == 1
    assert target["boxes"].tolist() == [[40, 20, 80, 50]] and target["labels"].tolist() == [2]
    inside = torch.zeros(64, 96, dtype=torch.bool)
    inside[20:50, 40:80] = True
    assert torch.equal(target["masks"][0].bool(), inside)
    assert image[:, inside].unique(dim=1).tolist() == [[0], [0], [1]]


@pytest.mark.parametrize(("architecture", "patch_size"), [("test_vit", 14), ("test_vit", 16), ("test_efficientnet", 0)])
def test_pyramid_strides_are_those_that_torchvision_assumes(
    finetune: Any, tmp_path: Path, architecture: str, patch_size: int
) -> None:
    import timm

    from backbones import build_backbone
    from llm2clip.models.vision.vision_tower import VisionTower

    args = {"patch_size": patch_size, "img_size": 4 * patch_size} if patch_size else {}
    model = timm.create_model(architecture, **args)
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    backbone = build_backbone(VisionTower.from_pretrained(tmp_path), bf16=False)
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for stride, feature_map in zip((4, 8, 16, 32, 64), maps.values(), strict=True):
        assert feature_map.shape == (2, 16, 64 // stride, -(-96 // stride))


def test_non_finite_loss_stops_the_training(finetune: Any, coco: Path, tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "tower", "test_efficientnet")
    with pytest.raises(ValueError, match=r"the loss is nan at step \d+: lower --lr"):
        finetune.main(make_config(finetune, tower, coco, tmp_path / "out", lr=1e20, steps=8, save_steps=100))
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
