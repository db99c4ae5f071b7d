"""Hashes of the training images, which are saved with a model so that `evaluate` can warn about them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from conftest import TouchOnLoad
from format_fixtures import image_bytes, write_tar
from llm2clip.data.image_facts import (
    TRAINING_IMAGES_FILE,
    count_training_images,
    hash_images,
    load_training_image_hashes,
    save_training_image_hashes,
)
from llm2clip.data.image_refs import FileImage, MemoryImage
from llm2clip.data.records import open_records


def test_training_images_are_recognised_in_other_folders_and_in_tar_files(image_folder: Path, tmp_path: Path) -> None:
    refs = [record.image for record in open_records(image_folder / "captions.jsonl")]
    hashes = hash_images([*refs[:20], refs[3], None, FileImage(str(tmp_path / "missing.png"))])
    assert len(hashes) == 20 and hashes.dtype == np.uint64 and count_training_images(hashes, refs) == 20
    copies = [FileImage(shutil.copy(str(ref), tmp_path / f"copy-{n}.png")) for n, ref in enumerate(refs)]
    assert count_training_images(hashes, copies) == 20
    members = {f"{n}.{suffix}": data for n, ref in enumerate(refs) for suffix, data in
               (("png", Path(str(ref)).read_bytes()), ("txt", b"a caption"))}  # fmt: skip
    tar = write_tar(tmp_path / "0.tar", members.items())
    assert count_training_images(hashes, [record.image for record in open_records(tar)]) == 20
    cells = [MemoryImage(image_bytes(seed)) for seed in range(4)]
    assert count_training_images(hash_images(cells[:3]), cells) == 3
    assert count_training_images(hash_images([]), refs) == 0


def test_training_images_are_saved_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_training_image_hashes(tmp_path) is None
    assert load_training_image_hashes("open_clip:ViT-B-32/openai") is None
    hashes = np.array([1, 2, 2**64 - 1], np.uint64)
    save_training_image_hashes(tmp_path, hashes)
    assert (tmp_path / TRAINING_IMAGES_FILE).stat().st_size <= 128 + 8 * 3
    loaded = load_training_image_hashes(tmp_path)
    assert loaded is not None and loaded.tolist() == hashes.tolist()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_training_image_hashes("org/model") is None
    commit = tmp_path / "hub/models--org--model/snapshots/1"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs/main").write_text("1")
    shutil.copy(tmp_path / TRAINING_IMAGES_FILE, commit)
    loaded = load_training_image_hashes("org/model")
    assert loaded is not None and loaded.tolist() == hashes.tolist(), "a model downloaded from the hub"
    for array in (np.zeros((2, 2), np.uint64), np.zeros(3), np.array([TouchOnLoad(tmp_path / "loaded")], object)):
        np.save(tmp_path / TRAINING_IMAGES_FILE, array, allow_pickle=True)
        with pytest.raises(ValueError, match="is not a valid array of image hashes"):
            load_training_image_hashes(tmp_path)
    (tmp_path / TRAINING_IMAGES_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match="is not a valid array of image hashes"):
        load_training_image_hashes(tmp_path)
    assert not (tmp_path / "loaded").exists()
