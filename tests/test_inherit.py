"""Inheritance of a CLIP model's embedding space and logits, on tiny random models of each library."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModel

from align_fixtures import ALIGN
from conftest import make_tower, run_distributed
from llm2clip.cli import build_parser, main
from llm2clip.config import AlignConfig
from llm2clip.data.images import load_image
from llm2clip.data.records import Record
from llm2clip.data.table import RecordTable
from llm2clip.models.clip_models import get_image_projection, read_pretrained_logit_scale_and_bias
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.loading import hash_weights
from llm2clip.store.layout import StoreError, make_caption_keys
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter
from llm2clip.train import initial_model
from llm2clip.train.initial_model import (
    create_initial_model,
    find_training_texts,
    iterate_training_texts,
    repeat_phrases,
)
from test_baselines import CLIP_STATS, make_model


def make_open_clip(folder: Path, kind: str) -> None:
    """Save a CLIP model as timm's repositories contain them: an open_clip model, and its image tower for timm.

    Args:
        folder: folder to save to.
        kind: "eva" for a tower whose classifier is the projection, as in EVA-CLIP. "timm-siglip" for a tower with
            attention pooling and without a projection, as in SigLIP.
    """
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    folder.mkdir(exist_ok=True)
    towers = {"eva": ("eva02_tiny_patch14_224", "token", 224, 12), "timm-siglip": ("test_vit3", "map", 160, 96)}
    name, pool, size, embed_dim = towers[kind]
    num_classes = embed_dim if kind == "eva" else 0
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": None if kind == "eva" else "none"}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    model_config = {"embed_dim": embed_dim, "vision_cfg": vision | {"image_size": size}, "text_cfg": text}
    preprocess = {"mean": CLIP_STATS["image_mean"], "std": CLIP_STATS["image_std"], "interpolation": "bicubic"}
    config = {"model_cfg": model_config | {"custom_text": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()
    if kind == "eva":
        torch.nn.init.normal_(clip.visual.trunk.head.bias)  # the projection of EVA-CLIP has a bias
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    save_file(clip.visual.trunk.state_dict(), folder / "model.safetensors")
    timm_config = {"input_size": [3, size, size], "fixed_input_size": True, "crop_pct": 1.0, "classifier": "head"}
    timm_config |= preprocess | {"num_classes": num_classes}
    model_args = {"global_pool": pool}
    architecture = {"architecture": name, "num_classes": num_classes, "model_args": model_args}
    (folder / "config.json").write_text(json.dumps(architecture | {"pretrained_cfg": timm_config}))


def make_clip(folder: Path, kind: str) -> tuple[str, str]:
    """Save a CLIP model; return the name of its vision tower and the name of the dual encoder."""
    if kind in ("eva", "timm-siglip"):
        make_open_clip(folder, kind)
        return f"timm:{folder}", f"open_clip:{folder}"
    make_model(folder, kind)
    return str(folder), str(folder)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial_model, "MIN_STEPS", 5)


def list_captions(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(caption for record in records for caption in record.captions + record.short_captions))


def config_for(tower: str, **settings: Any) -> AlignConfig:
    return dataclasses.replace(ALIGN, tower=tower, image_size=None, **{"inherit": True, **settings})


@pytest.mark.parametrize("kind", ["clip", "siglip", "eva", "timm-siglip"])
def test_inherited_model_has_the_image_embeddings_of_clip_and_learns_its_text_embeddings(
    kind: str, records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_model, "MIN_STEPS", 300)
    tower, name = make_clip(tmp_path / "clip", kind)
    model = create_initial_model(config_for(tower), store, records, tmp_path)
    clip = open_dual_encoder(name, "cpu")
    assert model.config.embed_dim == clip.embed_dim
    assert model.config.projection == (kind in ("clip", "eva"))

    images = [record.image for record in records[:3] if record.image is not None]
    expected = clip.encode_images([clip.transform(load_image(image)) for image in images])
    torch.testing.assert_close(model.encode_image(images), expected, atol=1e-5, rtol=0)

    texts = list_captions(records)
    with torch.no_grad():
        student = F.normalize(model.adapter(torch.from_numpy(store.take(store.find_rows(texts)))), dim=-1)
    teacher = clip.encode_texts(texts)
    # Random text towers map all texts to similar embeddings, so the differences from the mean are compared.
    mean = teacher.mean(0)
    assert F.cosine_similarity(student - mean, teacher - mean).mean() > 0.3


def test_projection_of_open_clips_own_vision_transformer() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(12, vision, text).eval()
    images = torch.randn(2, 3, 32, 32)
    projection = get_image_projection(clip)
    assert projection is not None
    with torch.no_grad():
        expected = clip.encode_image(images)
        clip.visual.proj = None
        torch.testing.assert_close(projection(clip.encode_image(images)), expected)


@pytest.mark.usefixtures("few_steps")
def test_adapter_is_saved_and_trained_again_only_if_something_changes(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower, _ = make_clip(tmp_path / "clip", "clip")
    first = create_initial_model(config_for(tower), store, records, tmp_path).adapter.state_dict()
    runs: list[int] = []
    train = initial_model._train_adapter
    monkeypatch.setattr(initial_model, "_train_adapter", lambda *args: runs.append(1) or train(*args))
    second = create_initial_model(config_for(tower, epochs=9), store, records, tmp_path).adapter.state_dict()
    assert not runs
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    create_initial_model(config_for(tower), store, records[1:], tmp_path)
    create_initial_model(config_for(tower, seed=1), store, records[1:], tmp_path)
    assert len(runs) == 2


@pytest.mark.usefixtures("few_steps")
def test_similarity_is_measured_on_held_out_texts_if_there_are_20_texts(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower, _ = make_clip(tmp_path / "clip", "clip")
    for count, expected in ((19, "of the training texts"), (20, "of the held-out texts")):
        captions = tuple(list_captions(records)[:count])
        create_initial_model(config_for(tower), store, [dataclasses.replace(records[0], captions=captions)], tmp_path)
        assert expected in capsys.readouterr().out


@pytest.mark.usefixtures("few_steps")
def test_clip_of_a_tower_may_be_named(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    tower, name = make_clip(tmp_path / "clip", "eva")
    from_tower = create_initial_model(config_for(tower), store, records, tmp_path)
    named = create_initial_model(config_for(tower, inherit=name), store, records, tmp_path)
    assert hash_weights(from_tower) == hash_weights(named)


def test_clip_model_that_does_not_fit_the_tower_is_an_error(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    tower, _ = make_clip(tmp_path / "clip", "clip")
    other = AutoModel.from_pretrained(tower)
    for parameter in other.vision_model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    make_model(tmp_path / "other", "clip")
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is not the image tower of this CLIP model \(cosine similarity"):
        create_initial_model(config_for(tower, inherit=str(tmp_path / "other")), store, records, tmp_path)
    vit = make_tower(tmp_path / "vit", "test_vit")
    with pytest.raises(
        ValueError, match=r"feature dimension \(64\) must equal the CLIP model's feature dimension \(16\)"
    ):
        create_initial_model(config_for(str(vit), inherit=tower), store, records, tmp_path)
    with pytest.raises(ValueError, match=r"--align.inherit true: the checkpoint of .* has no text tower"):
        create_initial_model(config_for(str(vit)), store, records, tmp_path)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_texts_are_the_short_ones_and_each_is_used_once(
    chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial_model, "LOOKUP_CHUNK_SIZE", chunk_size)
    stored = ["tail", "a long text", "bird", "dog", "cat"]
    store, clip_store = (make_text_store(tmp_path / str(n), texts) for n, texts in enumerate((stored, stored[::-1])))
    records = [
        Record("a", None, ("dog", "cat"), long_captions=("a long text",), phrases=("tail", "cat", "not stored")),
        Record("b", None, ("cat", "refused"), ("bird",), phrases=("tail",)),
    ]
    (store.folder / "refused-00000.jsonl").write_text('{"caption": "refused", "why": "no tokens"}\n')
    texts = find_training_texts(RecordTable.from_records(records), store, clip_store)
    assert texts.rows.tolist() == store.find_rows(["dog", "cat", "bird", "tail"]).tolist()
    assert texts.clip_rows.tolist() == clip_store.find_rows(["dog", "cat", "bird", "tail"]).tolist()
    assert texts.num_captions == 3
    only_long = RecordTable.from_records([Record("c", None, (), (), ("a long text",))])
    assert find_training_texts(only_long, store, clip_store).rows.tolist() == store.find_rows(["a long text"]).tolist()
    unknown = RecordTable.from_records([Record("d", None, ("unknown",))])
    with pytest.raises(StoreError, match="no embedding for the caption 'unknown'"):
        list(iterate_training_texts(unknown, store))


def make_text_store(folder: Path, texts: list[str]) -> EmbeddingStore:
    writer = StoreWriter(folder, {}, 2)
    writer.write(0, texts, [1] * len(texts), np.ones((len(texts), 2), np.float32))
    writer.finish()
    return EmbeddingStore(folder)


def test_phrases_are_repeated_until_they_are_half_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.array([8, 1, 0, 4, 9, 2, 7, 3])  # captions are 0 to 7
    assert sorted(repeat_phrases(order, 8).tolist()) == [0, 1, 2, 3, 4, 7, 8, 8, 8, 9, 9, 9]
    monkeypatch.setattr(initial_model, "MAX_REPEATS", 2)
    assert sorted(repeat_phrases(order, 8).tolist()) == [0, 1, 2, 3, 4, 7, 8, 8, 9, 9]
    for only_one_kind in (0, 10):
        assert sorted(repeat_phrases(order, only_one_kind).tolist()) == sorted(order.tolist())


def test_all_ranks_have_the_adapter_of_the_main_process(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    make_model(tmp_path / "clip", "clip")
    run_distributed(2, _inherit_on_rank, records, str(store.folder), str(tmp_path))
    hashes = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert hashes[0] == hashes[1]


def _inherit_on_rank(records: list[Record], store: str, folder: str) -> None:
    initial_model.MIN_STEPS = 2
    model = create_initial_model(config_for(f"{folder}/clip"), EmbeddingStore(store), records, Path(folder))
    (Path(folder) / str(torch.distributed.get_rank())).write_text(hash_weights(model))


@pytest.mark.usefixtures("few_steps")
def test_fit_inherits_phrases(image_folder: Path, llm: Path, tmp_path: Path) -> None:
    tower, _ = make_clip(tmp_path / "clip", "clip")
    flags = ["--columns", json.dumps({"long_captions": ""}), "--encoder.path", str(llm)]
    flags += ["--tune.steps", "0", "--align.tower", tower, "--align.inherit", "true", "--align.batch_size", "8"]
    flags += ["--align.epochs", "1", "--align.workers", "0"]
    run = tmp_path / "run"
    assert main(["fit", str(image_folder / "captions.jsonl"), "--out", str(run), *flags]) == 0
    assert (run / "align" / initial_model.WEIGHTS).exists()
    (clip_store,) = (run / "align").glob("clip-texts-*")
    for folder in (run / "store", clip_store):
        assert EmbeddingStore(folder).find_keys(make_caption_keys(["border"])) >= 0


def test_inherit_flag_parses_as_bool_or_name() -> None:
    parser, _ = build_parser()
    for value, expected in (
        ("true", True),
        ("false", False),
        ("open_clip:ViT-B-16/openai", "open_clip:ViT-B-16/openai"),
    ):
        args = parser.parse_args(["fit", "a.jsonl", "--out", "r", "--align.inherit", value]).fit
        assert args.align.inherit == expected and isinstance(args.align.inherit, type(expected))


# ---- logit scale and bias -------------------------------------------------------------------------------------------


def save_clip(folder: Path, kind: str, scale: float) -> str:
    """Save a transformers model with this logit scale and, for SigLIP, a logit bias of -16.5."""
    make_model(folder, kind)
    model = AutoModel.from_pretrained(folder)
    torch.nn.init.constant_(model.logit_scale, math.log(scale))
    if kind == "siglip":
        torch.nn.init.constant_(model.logit_bias, -16.5)
    model.save_pretrained(folder)
    return str(folder)


def test_logit_scale_of_a_clip_checkpoint_is_inherited(store: EmbeddingStore, tmp_path: Path) -> None:
    clip = save_clip(tmp_path / "clip", "clip", 80)
    assert read_pretrained_logit_scale_and_bias(clip) == (pytest.approx(80, rel=1e-6), None)
    *_, scale, bias = create_initial_model(config_for(clip, inherit=False, logit_scale="inherit"), store)()
    assert scale.item() == pytest.approx(80, rel=1e-5) and bias.item() == 0
    AutoModel.from_pretrained(clip).save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert (tmp_path / "shards/model.safetensors.index.json").is_file()
    assert read_pretrained_logit_scale_and_bias(str(tmp_path / "shards"))[0] == pytest.approx(80, rel=1e-6)


def test_siglip_scale_is_clamped_and_its_bias_is_inherited_with_the_sigmoid_loss(
    store: EmbeddingStore, tmp_path: Path
) -> None:
    config = config_for(save_clip(tmp_path, "siglip", 112.7), inherit=False, logit_scale="inherit")
    *_, scale, bias = create_initial_model(dataclasses.replace(config, loss="sigmoid"), store)()
    assert (scale.item(), bias.item()) == (pytest.approx(100, rel=1e-5), -16.5)
    assert create_initial_model(config, store).logit_bias is None


def test_logit_scale_of_a_timm_tower_is_read_from_the_open_clip_file(tmp_path: Path) -> None:
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"visual.trunk.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    save_file({"logit_scale": torch.tensor(math.log(50.0))}, tmp_path / "open_clip_model.safetensors")
    assert read_pretrained_logit_scale_and_bias(f"timm:{tmp_path}")[0] == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("name", ["folder", "test_vit", "no_such_model"])
def test_tower_without_logit_scale_is_an_error_that_suggests_a_number(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no logit scale"):
        read_pretrained_logit_scale_and_bias(str(make_tower(tmp_path, "test_vit")) if name == "folder" else name)


@pytest.mark.parametrize(
    ("loss", "setting", "expected"),
    [("infonce", None, 1 / 0.07), ("sigmoid", None, 10), ("infonce", 30.0, 30), ("sigmoid", 100, 100)],
)
def test_logit_scale_setting(
    loss: str, setting: float | None, expected: float, tower: Path, store: EmbeddingStore
) -> None:
    *_, scale, bias = create_initial_model(
        config_for(str(tower), inherit=False, loss=loss, logit_scale=setting), store
    )()
    assert scale.item() == pytest.approx(expected, rel=1e-5)
    assert bias.item() == (-10 if loss == "sigmoid" else 0)
