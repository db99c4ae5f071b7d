"""mteb's check of models, for a model folder and for a checkpoint of the LLM2CLIP authors."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.published_encoders import LLAMA_3_8B
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
    expected, image_vectors = converted.encode_document(pairs), converted.encode_image(images)
    model: Any = get_model_meta(str(checkpoint), text=str(llm)).load_model(device="cpu")
    embeddings = model.encode([{"image": images, "text": texts}])
    torch.testing.assert_close(torch.from_numpy(model.encode([{"image": images, "text": ["", ""]}])), image_vectors)
    assert model.mteb_model_meta.name == f"{tmp_path.name}/LLM2CLIP-Openai-B-16"
    torch.testing.assert_close(torch.from_numpy(embeddings), expected)


def test_metadata_of_checkpoints_that_mteb_lists_are_kept() -> None:
    import mteb

    name = "microsoft/LLM2CLIP-Openai-L-14-336"
    meta, original = get_model_meta(name), mteb.get_model_meta(name)
    assert meta.to_dict()["loader"] == "load_model" and meta.extra_requirements_groups is None
    assert (meta.name, meta.revision, meta.training_datasets) == (name, original.revision, original.training_datasets)
    assert original.use_instructions and meta.use_instructions is False  # prompts are not added to texts


def test_only_equal_models_have_the_same_path_for_results(tmp_path: Path) -> None:
    import mteb

    folders = [tmp_path / name for name in ("LLM2CLIP-a", "LLM2CLIP-b", "text/a", "text/b")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        torch.save({"weights": torch.tensor(number)}, folder / ("a.pt" if number < 2 else "model.bin"))

    def get_path(meta: Any) -> Path:
        return mteb.ResultCache(tmp_path / "results").get_task_result_path("CIFAR10", meta)

    checkpoint, other, *encoders = map(str, folders)
    first = get_path(get_model_meta(checkpoint))
    torch.save({"weights": torch.tensor(9)}, folders[0] / "a.pt")
    name = "microsoft/LLM2CLIP-Openai-B-16"
    listed = [get_path(get_model_meta(name, text)) for text in (None, "me/encoder", *encoders)]
    metas = [get_model_meta(other), *(get_model_meta(checkpoint, text) for text in (None, *encoders))]
    paths = [first, get_path(mteb.get_model_meta(name)), *listed, *map(get_path, metas)]
    assert len(set(paths)) == len(paths) == 10
    assert str(tmp_path) not in "".join(str(meta.to_dict()) for meta in metas)
    assert get_path(get_model_meta(checkpoint, encoders[0])) == paths[-2]


def test_local_folders_precede_the_models_that_mteb_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "microsoft/LLM2CLIP-Openai-B-16"
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    llm = save_llm(tmp_path / "llm")
    write_checkpoint("openai", tmp_path / name)
    meta = get_model_meta(name, text=str(llm))
    assert (meta.name, meta.license) == (name, None)
    assert len(meta.load_model(device="cpu").encode([{"text": ["a", "b"]}])) == 2


def test_models_of_other_authors_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"openai/clip-vit-base-patch32 .*: use mteb\.get_model_meta\('openai/clip"):
        get_model_meta("openai/clip-vit-base-patch32")
    for name in ("/does/not/exist", "open_clip:ViT-B-32/openai"):
        with pytest.raises(FileNotFoundError, match="is neither an existing path nor a hub id"):
            get_model_meta(name)


def test_caption_encoder_is_chosen_by_the_full_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.evaluate import mteb

    attached: list[str] = []
    folder = tmp_path / "models--microsoft--LLM2CLIP-Openai-B-16/snapshots/0123"
    folder.mkdir(parents=True)
    model = SimpleNamespace(config=SimpleNamespace(text_dim=4096, tower={"architecture": {}}))
    monkeypatch.setattr(mteb, "load_official_checkpoint", lambda source: model)
    monkeypatch.setattr(mteb, "attach_caption_encoder", lambda model, encoder, source: attached.append(encoder))
    with pytest.raises(AttributeError):  # the model cannot be moved to a device
        get_model_meta(str(folder)).load_model(device="cpu")
    assert attached == [LLAMA_3_8B]


def test_checkpoint_with_an_unknown_caption_encoder_is_explained(tmp_path: Path) -> None:
    write_checkpoint("openai", tmp_path)
    message = r"the caption encoder of .* is unknown \(candidates: none\)\. Pass the encoder with which the"
    with pytest.raises(ValueError, match=message):
        get_model_meta(str(tmp_path)).load_model(device="cpu")
