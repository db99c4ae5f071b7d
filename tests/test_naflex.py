"""Tests of SigLIP 2 NaFlex towers, and of align with the towers of each recent family."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from align_fixtures import ALIGN, make_store, read_split
from llm2clip.data.images import load_image
from llm2clip.data.naflex import pack_patches, unpack_patches
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform, Preprocess, TrainTransform
from llm2clip.llava.vision import to_llava_tower
from llm2clip.models.export.formats import export_model
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.tools.plan.flops import image_costs
from llm2clip.train.align import align
from test_baselines import image_files as image_files  # the fixture
from test_export import make_model
from test_vision_tower import save_hf, save_timm

PREPROCESS = Preprocess.for_patches(8, 16, "bilinear", (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random NaFlex model with at most 16 patches of 8 x 8 pixels, with both towers, as published."""
    folder = tmp_path_factory.mktemp("naflex")
    save_hf("siglip2", folder)
    return folder


def make_image(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_features_equal_those_of_transformers_for_images_of_any_shape(naflex: Path, image_files: list[Path]) -> None:
    from transformers import AutoImageProcessor, AutoModel

    tower = VisionTower.from_pretrained(naflex)
    transform = EvalTransform(tower.preprocess)
    packed = torch.stack([transform(load_image(file)) for file in image_files])
    assert packed.shape == (3, 17, 192) and packed.dtype == torch.uint8
    features = tower(packed)

    reference, processor = AutoModel.from_pretrained(naflex).float().eval(), AutoImageProcessor.from_pretrained(naflex)
    inputs = processor([Image.open(file) for file in image_files], return_tensors="pt")
    assert len({tuple(shape) for shape in inputs["spatial_shapes"].tolist()}) == 3
    expected = reference.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert (features[0] - features[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("height", "width"), [(32, 32), (9, 300), (300, 9), (1, 1), (65, 31), (1, 5000)])
def test_patches_equal_those_of_transformers(height: int, width: int) -> None:
    from transformers import Siglip2ImageProcessor

    processor = Siglip2ImageProcessor(patch_size=8, max_num_patches=300)
    image = make_image(height, width)
    expected = processor([image], return_tensors="pt")
    patches, shapes = unpack_patches(pack_patches(image, 8, 300, "bilinear")[None])
    assert torch.equal(shapes, expected["spatial_shapes"])
    count = int(shapes.prod())
    assert count == expected["pixel_attention_mask"].sum()
    torch.testing.assert_close(patches[0, :count] / 127.5 - 1, expected["pixel_values"][0, :count], atol=1e-6, rtol=0)
    assert not patches[0, count:].any()


def test_train_transform_crops_and_keeps_the_aspect_ratio() -> None:
    image = torch.arange(200, dtype=torch.uint8).repeat(3, 100, 1)  # each column has a different colour
    whole = EvalTransform(PREPROCESS)(image)
    assert torch.equal(TrainTransform(PREPROCESS, 1.0)(image, torch.Generator()), whole)
    crops = [TrainTransform(PREPROCESS, 0.5)(image, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    for crop in crops:
        patches, shapes = unpack_patches(crop[None])
        assert torch.equal(shapes, unpack_patches(whole[None])[1])
        rows, columns = shapes[0].tolist()
        grid = patches[0, : rows * columns].view(rows, columns, 8, 8, 3).int()
        width = (grid[0, -1, 0, -1, 0] - grid[0, 0, 0, 0, 0]).item() / 200  # fraction of the width that is visible
        assert 0.5**0.5 - 0.1 < width < 1


def test_preprocessing_is_saved_in_the_format_of_transformers(tmp_path: Path) -> None:
    import json

    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESS.to_dict()))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor).__name__.startswith("Siglip2ImageProcessor")
    assert Preprocess.from_dict(processor.to_dict()) == PREPROCESS == Preprocess.from_dict(PREPROCESS.to_dict())
    assert PREPROCESS.size == 32


def test_image_size_and_other_patch_sizes_are_rejected(naflex: Path, tmp_path: Path) -> None:
    from transformers import Siglip2ImageProcessor

    with pytest.raises(ValueError, match=r"no fixed image size: remove --align\.image_size"):
        VisionTower.from_pretrained(naflex, image_size=64)
    save_hf("siglip2_vision_model", tmp_path)
    Siglip2ImageProcessor(patch_size=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"patch_size is 16, but the model's is 8"):
        VisionTower.from_pretrained(tmp_path)


def test_without_a_processor_config_the_model_defines_the_patches(tmp_path: Path) -> None:
    save_hf("siglip2_vision_model", tmp_path, processor=False)
    preprocess = VisionTower.from_pretrained(tmp_path).preprocess
    assert preprocess == Preprocess.for_patches(8, 16, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("family", ["siglip2", "metaclip_2", "dinov3_vit", "vit_pe_core_small_patch16_384"])
def test_align_trains_saves_and_loads_recent_towers(family: str, image_folder: Path, llm: Path, tmp_path: Path) -> None:
    if family.startswith("vit_pe"):
        save_timm(family, tmp_path / "tower")
    else:
        save_hf(family, tmp_path / "tower")
    tower = VisionTower.from_pretrained(tmp_path / "tower")
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    model = LLM2CLIP(LLM2CLIPConfig(tower.config, text_dim=32, embed_dim=12, adapter_depth=1), tower)
    store = make_store(image_folder, llm, tmp_path / "store")
    config = dataclasses.replace(ALIGN, epochs=1, tower_lr=1e-3, image_size=None)
    align(read_split(image_folder), store, model, config, tmp_path / "run", SkipLog())
    trained = {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}
    assert trained and all(torch.isfinite(parameter).all() for parameter in trained.values())
    changed = [name for name, parameter in trained.items() if not torch.equal(parameter, before[name])]
    assert len(changed) > 0.9 * len(trained)

    model.save_pretrained(tmp_path / "model")
    loaded = LLM2CLIP.from_pretrained(tmp_path / "model", "cpu")
    assert loaded.tower.preprocess == tower.preprocess
    files = sorted(image_folder.glob("*.png"))[:3]
    assert torch.equal(loaded.encode_image(files), model.encode_image(files))


def test_plan_rejects_a_naflex_tower(naflex: Path) -> None:
    with pytest.raises(ValueError, match="does not support NaFlex towers"):
        image_costs(dataclasses.replace(ALIGN, tower=str(naflex), image_size=None), text_dim=32, captions=1)


@torch.no_grad()
def test_exports_of_a_naflex_tower(naflex: Path, tmp_path: Path, image_files: list[Path]) -> None:
    from transformers import AutoImageProcessor, AutoModel

    model = make_model(tmp_path, VisionTower.from_pretrained(naflex))
    for to in ("transformers", "sentence-transformers", "onnx"):
        with pytest.raises(ValueError, match="requires a vision tower with a fixed image size"):
            export_model(model, to, tmp_path / to)
        assert not (tmp_path / to).exists()
    with pytest.raises(ValueError, match="requires a timm vision tower"):
        export_model(model, "open_clip", tmp_path / "open_clip")
    with pytest.raises(ValueError, match="LLaVA requires a vision tower with a fixed image size"):
        to_llava_tower(model.tower)

    export_model(model, "vision", tmp_path / "vision")
    exported = AutoModel.from_pretrained(tmp_path / "vision").eval()
    inputs = AutoImageProcessor.from_pretrained(tmp_path / "vision")(
        [Image.open(f) for f in image_files], return_tensors="pt"
    )
    packed = torch.stack([EvalTransform(model.tower.preprocess)(load_image(file)) for file in image_files])
    torch.testing.assert_close(exported(**inputs).pooler_output, model.tower(packed), atol=1e-5, rtol=0)
