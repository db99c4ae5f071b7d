"""mteb's check of models, for a model folder and for a checkpoint of the LLM2CLIP authors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.models.official_checkpoint import load_official_checkpoint
from official_reference import TEXTS, save_llm
from test_published_checkpoints import write_checkpoint


def get_model_meta(source: str, text: str | None = None) -> Any:
    """Import mteb only when a test runs, because this takes seconds."""
    from llm2clip.evaluate import mteb

    return mteb.get_model_meta(source, text)


def test_model_folder_passes_the_mock_run_of_mteb(model_folder: Path) -> None:
    import mteb

    meta = get_model_meta(str(model_folder))
    assert meta.name == "/".join(model_folder.parts[-2:]) and meta.embed_dim == 16
    assert str(model_folder.parent) not in str(meta.to_dict())  # mteb saves the metadata with the results
    results = mteb.mock_run(meta.load_model(device="cpu"))
    ran = {name for name, status in results.items() if status is not None}
    assert {"MockRetrievalTask", "MockAny2AnyRetrievalT2I", "MockVisualSTS", "MockZeroShotClassification"} <= ran
    assert results.all_passed, results.to_markdown()


def test_checkpoint_of_the_authors_is_loaded_with_its_caption_encoder(tmp_path: Path) -> None:
    checkpoint, llm = tmp_path / "LLM2CLIP-Openai-B-16", save_llm(tmp_path / "llm")
    checkpoint.mkdir()
    write_checkpoint("openai", checkpoint)
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    texts = [TEXTS["short"], TEXTS["other script"]]
    converted = load_official_checkpoint(checkpoint, text=llm)
    pairs = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
    expected = converted.encode_document(pairs)
    model: Any = get_model_meta(str(checkpoint), text=str(llm)).load_model(device="cpu")
    embeddings = model.encode([{"image": images, "text": texts}])
    assert model.mteb_model_meta.name == f"{tmp_path.name}/LLM2CLIP-Openai-B-16"
    torch.testing.assert_close(torch.from_numpy(embeddings), expected)


def test_metadata_of_checkpoints_that_mteb_lists_are_kept() -> None:
    import mteb

    name = "microsoft/LLM2CLIP-Openai-L-14-336"
    meta, original = get_model_meta(name), mteb.get_model_meta(name)
    assert meta.to_dict()["loader"] == "load_model" and meta.extra_requirements_groups is None
    assert (meta.name, meta.revision, meta.training_datasets) == (name, original.revision, original.training_datasets)


def test_checkpoint_with_an_unknown_caption_encoder_is_explained(tmp_path: Path) -> None:
    write_checkpoint("openai", tmp_path)
    with pytest.raises(ValueError, match=r"the caption encoder of .* is not known \(candidates: none\)\. Pass the one"):
        get_model_meta(str(tmp_path)).load_model(device="cpu")
