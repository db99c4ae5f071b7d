"""Sizes and hashes from parts of images, compared with `open_image_header` and full hashes, also for corrupt images."""

import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from conftest import TouchOnLoad, load_benchmark
from format_fixtures import encode, image_bytes, write_tar
from llm2clip.data.image_facts import (
    TRAINING_IMAGES_FILE,
    ImageFacts,
    count_training_images,
    get_distinct_image_hashes,
    load_training_image_hashes,
    read_image_facts,
    save_training_image_hashes,
)
from llm2clip.data.image_header import MAX_IMAGE_BYTES, START_BYTES, open_image_header, parse_image_size
from llm2clip.data.image_refs import FileImage, InMemoryImage, LoadedImage, TarImage
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import BadRowError

fuzz = load_benchmark("fuzz")
mutate_image: Callable[[bytes, random.Random], bytes] = fuzz.mutate_image


NOISE = Image.effect_noise((50, 40), 80).convert("RGB")
SIMPLE_IMAGES = [
    encode(NOISE, "JPEG"), encode(NOISE, "JPEG", quality=95, optimize=True), encode(NOISE, "JPEG", progressive=True),
    encode(NOISE.convert("L"), "JPEG"), encode(NOISE.convert("CMYK"), "JPEG"),
    encode(NOISE, "JPEG", dpi=(72, 72), icc_profile=b"x" * 200, comment=b"comment", xmp=b"<x/>"),
]  # fmt: skip


def read_size_with_pillow(data: bytes) -> tuple[int, int] | type[Exception]:
    try:
        return open_image_header(io.BytesIO(data)).size
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("data", SIMPLE_IMAGES, ids=range(len(SIMPLE_IMAGES)))
def test_ordinary_jpeg_files_are_not_opened_with_pillow(data: bytes) -> None:
    assert parse_image_size(data[:START_BYTES], len(data)) == read_size_with_pillow(data) == (50, 40)


@pytest.mark.parametrize("seed", range(10))
def test_size_of_corrupt_images_is_that_of_pillow(seed: int) -> None:
    rng, seeds = random.Random(seed), fuzz.image_seeds()
    num_simple = 0
    for _ in range(400):
        data = mutate_image(rng.choice(rng.choice([SIMPLE_IMAGES, seeds])), rng)
        if rng.random() < 0.5:  # the fuzzer changes bytes anywhere, but most fields are at the start
            data = mutate_image(data[:60], rng) + data[60:]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data))]
        size = parse_image_size(data, len(data))
        start = parse_image_size(data[: rng.randrange(700)], len(data))
        if size is not None:
            num_simple += 1
            assert size == read_size_with_pillow(data)
        assert start is None or start == size
    assert num_simple > 40


@pytest.mark.parametrize(
    "data",
    [b"", b"x", b"\xff\xd8\xff", b"%PDF-1.7", encode(NOISE, "PNG"), encode(NOISE, "WEBP")],
    ids=["empty", "other", "truncated jpeg", "pdf", "png", "webp"],
)
def test_size_of_other_files_is_unknown(data: bytes) -> None:
    assert parse_image_size(data, len(data)) is None


def test_size_of_a_file_over_the_limit_is_unknown() -> None:
    assert parse_image_size(SIMPLE_IMAGES[0], MAX_IMAGE_BYTES + 1) is None


@pytest.mark.parametrize("num_bytes", [1, 500, 1023, 1024, 1025, 3000, 4096, 5119, 5120, 9000, 50_000])
def test_facts_of_files_and_tar_members_are_those_of_images_in_memory(num_bytes: int, tmp_path: Path) -> None:
    data = SIMPLE_IMAGES[0][:num_bytes].ljust(num_bytes, b"x")
    (tmp_path / "x.jpg").write_bytes(data)
    (tmp_path / "x.tar").write_bytes(b"before" + data + b"after")
    refs = [FileImage(str(tmp_path / "x.jpg")), TarImage(str(tmp_path / "x.tar"), 6, num_bytes)]
    has_header = read_size_with_pillow(data) == (50, 40)
    for image in [LoadedImage(ref, loaded) for ref in refs for loaded in (None, data)]:
        facts = read_image_facts(image, check=has_header, compute_hash=True)
        assert facts == ImageFacts(
            *((50, 40) if has_header else (0, 0)), int(get_distinct_image_hashes([image.ref])[0])
        )


def test_facts_of_an_empty_file_have_no_hash(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").touch()
    image = LoadedImage(FileImage(str(tmp_path / "x.jpg")), None)
    assert read_image_facts(image, check=False, compute_hash=True) == ImageFacts()
    with pytest.raises(BadRowError):
        read_image_facts(image, check=True, compute_hash=True)


def test_facts_of_a_named_pipe_do_not_wait_for_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jpg")
    image = LoadedImage(FileImage(str(tmp_path / "x.jpg")), None)
    with pytest.raises(BadRowError, match="missing image"):
        read_image_facts(image, check=True, compute_hash=True)


# ---- training images -------------------------------------------------------------------------------------------------


def test_training_images_are_recognised_in_other_folders_and_in_tar_files(image_folder: Path, tmp_path: Path) -> None:
    refs = [record.image for record in open_records(image_folder / "captions.jsonl")]
    hashes = get_distinct_image_hashes([*refs[:20], refs[3], None, FileImage(str(tmp_path / "missing.png"))])
    assert len(hashes) == 20 and hashes.dtype == np.uint64 and count_training_images(hashes, refs) == 20
    copies = [FileImage(shutil.copy(str(ref), tmp_path / f"copy-{n}.png")) for n, ref in enumerate(refs)]
    assert count_training_images(hashes, copies) == 20
    members = {f"{n}.{suffix}": data for n, ref in enumerate(refs) for suffix, data in
               (("png", Path(str(ref)).read_bytes()), ("txt", b"a caption"))}  # fmt: skip
    tar = write_tar(tmp_path / "0.tar", members.items())
    assert count_training_images(hashes, [record.image for record in open_records(tar)]) == 20
    cells = [InMemoryImage(image_bytes(seed)) for seed in range(4)]
    assert count_training_images(get_distinct_image_hashes(cells[:3]), cells) == 3
    assert count_training_images(get_distinct_image_hashes([]), refs) == 0


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
