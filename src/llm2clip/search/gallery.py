"""Export of an index as a static web page that searches in the browser and needs no server.

    GALLERY/
      index.html, gallery.js, ...          page
      gallery.json                         settings of the text encoder; name, caption and metadata of each image
      vectors.bin                          image vectors (see `quantize_vectors`): mean (D float32 values), N float32
                                           scales, then int8 values of shape (N, D)
      thumbnails/0.jpg, ...                thumbnails, newest image first
      text.onnx                            text encoder with 8-bit weights (see `models/export/onnx.py`)
      tokenizer.json, ...                  tokenizer
      lib/                                 onnxruntime-web and @huggingface/tokenizers
      LICENSES.txt                         licences of the files in lib/

The page loads only files from its own folder. The gallery contains neither full-size images nor their local paths.
An image that was indexed from a URL has a link to this URL.
"""

import json
import shutil
import unicodedata
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from llm2clip.io_utils import atomic_dir, format_bytes, format_count, require_extra
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.export.onnx import count_final_tokens, export_quantized_text_encoder
from llm2clip.models.export.transformers import CHECKED_TEXTS, SAMPLE_TEXTS, build_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP, truncate_model
from llm2clip.models.pretrained import ONNXRUNTIME_WEB, TOKENIZERS, resolve_npm_package
from llm2clip.models.prompts import MAX_TEMPLATE_CHARACTERS
from llm2clip.progress import ProgressBar
from llm2clip.runs.ranks import print_once
from llm2clip.search.backends import IndexBackend, hide_password, open_backend
from llm2clip.search.metadata import Filter, describe_metadata
from llm2clip.search.query import truncate_model_to_index
from llm2clip.search.types import Hit

PAGE_FOLDER = Path(__file__).parent / "gallery_page"
STATIC_FOLDER = Path(__file__).parent / "static"
MIT_LICENSE = Path(__file__).with_name("mit_license.txt")
MAX_MB = 1000  # default size limit of a gallery, which is also the limit of several free web hosts
# Larger text encoders, such as most LLMs, are too slow to download and need too much memory in a browser.
MAX_TEXT_PARAMETERS = 125_000_000
HITS_PER_READ = 1000
SAMPLED_THUMBNAILS = 200  # number of thumbnails from which the total size of all thumbnails is estimated
MAX_CAPTION_CHARACTERS = 300
NEW_FILES = ".new"  # temporary folder in an existing gallery for the files that will replace the current files


def export_gallery(
    model_name: str, index: str, out: str | Path, max_mb: float = MAX_MB, with_private: bool = False
) -> list[str]:
    """Write a static web page that searches an index in the browser.

    A new gallery is written atomically. If `out` contains a gallery, its files are replaced once all new files have
    been written. Other files in `out`, such as a Git repository, are kept. The page title is the name of the folder.

    Args:
        model_name: llm2clip model that built the index. Its text encoder must be small enough for a browser.
        index: Index folder or URL, as in `open_backend`.
        max_mb: Maximum size of the gallery in MB.
        with_private: Also include private metadata, such as GPS positions.

    Returns:
        Messages about the accuracy of the 8-bit text encoder and the size of the gallery.

    Raises:
        ValueError: The index is empty or was built with a different model, the text encoder cannot be exported or is
            too large for a browser, or the gallery would be larger than `max_mb`.
        FileExistsError: `out` exists and does not contain a gallery.
        AssetError: The JavaScript libraries cannot be downloaded.
    """
    is_update = (Path(out) / "gallery.json").is_file()
    if Path(out).exists() and not is_update:
        raise FileExistsError(f"{out} exists and does not contain a gallery. Choose another folder")
    require_extra("onnx", "exporting to ONNX")
    backend = open_backend(index)
    model = LLM2CLIP.from_pretrained(model_name, device="cpu")
    metadata = backend.read_metadata()
    truncate_model_to_index(metadata, wrap_llm2clip(model, model_name))
    parameters = check_text_encoder_size(model, model_name)
    check_gallery_size(index, backend, parameters, max_mb)
    model = truncate_model(model, int(metadata["embed_dim"]))
    libraries = [(package, resolve_npm_package(package)) for package in (ONNXRUNTIME_WEB, TOKENIZERS)]
    target = Path(out) / NEW_FILES if is_update else Path(out)
    if is_update:
        shutil.rmtree(target, ignore_errors=True)  # an interrupted update may have left this folder
    with atomic_dir(target) as folder:
        for file in (*PAGE_FOLDER.iterdir(), STATIC_FOLDER / "common.js", STATIC_FOLDER / "page.css"):
            shutil.copyfile(file, folder / file.name)
        (folder / "lib").mkdir()
        for package, library in libraries:
            for name in package.files.values():
                shutil.copyfile(library / name, folder / "lib" / name)
        (folder / "LICENSES.txt").write_text(_format_licenses(), encoding="utf-8")
        messages = [export_quantized_text_encoder(model, folder)]
        images = _write_gallery_images(backend, folder, with_private)
        settings = {**_build_text_encoder_settings(model), "images": images, "count": len(images)}
        settings |= {"dim": model.config.embed_dim, "title": Path(out).resolve().name}
        (folder / "gallery.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        messages.append(f"{format_count(len(images), 'image')}, {format_bytes(size)}")
    if is_update:
        _replace_gallery_files(target, Path(out), len(images))
    return messages


def _replace_gallery_files(new: Path, gallery: Path, count: int) -> None:
    """Move new files into an existing gallery, and delete the old thumbnails that are no longer used."""
    for file in [path for path in new.rglob("*") if path.is_file()]:
        target = gallery / file.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        file.replace(target)
    for thumbnail in (gallery / "thumbnails").glob("*.jpg"):
        if thumbnail.stem.isdigit() and int(thumbnail.stem) >= count:
            thumbnail.unlink()
    shutil.rmtree(new)


# ---- checks


def check_text_encoder_size(model: LLM2CLIP, name: str) -> int:
    """Return the number of text encoder parameters. Raise ValueError if the number exceeds MAX_TEXT_PARAMETERS."""
    if not model.has_encoder:
        raise ValueError(
            f"{name} has no caption encoder, so it cannot encode queries. Add a caption encoder: llm2clip convert "
            f"{name} --text ENCODER --out MODEL"
        )
    # The parameters of a saved encoder are counted in its files, because loading the encoder could take minutes.
    folder = model.text_folder
    if folder is not None:
        count = sum(_count_saved_parameters(file) for file in folder.rglob("*.safetensors"))
    else:
        count = sum(parameter.numel() for parameter in model.encoder.parameters())
    count += sum(parameter.numel() for parameter in model.adapter.parameters())
    if count > MAX_TEXT_PARAMETERS:
        raise ValueError(
            f"the text encoder of {name} is too large for a browser: {count / 1e6:,.0f} million parameters, but the "
            f"limit is {MAX_TEXT_PARAMETERS / 1e6:,.0f} million. Train a small text encoder for this model and use the "
            f"resulting model: llm2clip distill {name} DATA --student all-minilm-l6-v2 --out MODEL2"
        )
    return count


def _count_saved_parameters(file: Path) -> int:
    with safe_open(file, framework="numpy") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


def check_gallery_size(index: str, backend: IndexBackend, text_parameters: int, max_mb: float) -> None:
    """Print the estimated size of a gallery. Raise ValueError if the gallery would be empty or too large."""
    _, count = backend.count_images()
    if not count:
        raise ValueError(f"{hide_password(index)} contains no images. Add images with `llm2clip index`")
    hits = backend.search(None, SAMPLED_THUMBNAILS, Filter())
    thumbnail_bytes = np.mean([len(backend.read_thumbnail(hit.id) or b"") for hit in hits])
    dim = int(backend.read_metadata()["embed_dim"])
    parts = {
        "thumbnails": count * float(thumbnail_bytes),
        "vectors": 4 * dim + count * (dim + 4),
        "text encoder": text_parameters,
        "libraries": 14_400_000,
    }
    total = sum(parts.values())
    sizes = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    summary = f"about {format_bytes(total)} for {format_count(count, 'image')} ({sizes})"
    if total > max_mb * 1e6:
        raise ValueError(
            f"the gallery would be too large: {summary}. The limit is {format_bytes(max_mb * 1e6)}. Index fewer "
            "images, or raise the limit with --max_mb. A browser loads all vectors and the text encoder into memory, "
            "so use `llm2clip serve` for large collections"
        )
    print_once(f"Gallery: {summary}")


# ---- contents


def _write_gallery_images(backend: IndexBackend, folder: Path, with_private: bool) -> list[list[Any]]:
    """Write thumbnails and vectors. Return the file name, caption and metadata of each image, newest first."""
    (folder / "thumbnails").mkdir()
    images: list[list[Any]] = []
    vectors = []
    with ProgressBar(total=backend.count_images()[1], desc="gallery", unit="image") as bar:
        for hit in iterate_all_hits(backend):
            vector, thumbnail = backend.read_vector(hit.id), backend.read_thumbnail(hit.id)
            if vector is None or thumbnail is None:  # another process has removed the image since the search
                continue
            (folder / f"thumbnails/{len(images)}.jpg").write_bytes(thumbnail)
            image = hit.images[0]
            caption = image.captions[0][:MAX_CAPTION_CHARACTERS] if image.captions else ""
            details = [[item.text, item.url] for item in describe_metadata(hit, image, with_private)]
            path = getattr(image.ref, "path", "")
            if path.startswith(("http://", "https://")) and path == image.name:  # the URL contains no secrets
                details.append(["original", path])
            images.append([image.file_name, caption, details])
            vectors.append(vector.astype(np.float16))
            bar.update(1)
    mean, scales, values = quantize_vectors(np.stack(vectors).astype(np.float32))
    content = mean.astype("<f4").tobytes() + scales.astype("<f4").tobytes() + values.tobytes()
    (folder / "vectors.bin").write_bytes(content)
    return images


def iterate_all_hits(backend: IndexBackend) -> Iterator[Hit]:
    offset = 0
    while hits := backend.search(None, HITS_PER_READ, Filter(), offset):
        yield from hits
        offset += HITS_PER_READ


def quantize_vectors(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotate L2-normalised vectors, subtract their mean and quantise them to int8 with one scale per vector.

    The embeddings of aligned models are rotated to principal components, so a few dimensions are much larger than the
    others. With one scale per vector, int8 would represent the small dimensions inaccurately. The discrete Hartley
    transform, an orthogonal matrix that the page can compute, spreads the values evenly over all dimensions.

    Args:
        vectors: float32 array of shape (N, D).

    Returns:
        The mean of the rotated vectors (float32, shape (D,)), the scale of each vector (float32, shape (N,)) and the
        int8 values (shape (N, D)). A rotated vector is approximately mean + scale * values.
    """
    rotated = vectors @ make_hartley_matrix(vectors.shape[1])
    mean = rotated.mean(axis=0)
    rotated -= mean
    largest = np.maximum(np.abs(rotated).max(axis=1, keepdims=True), 1e-12)
    values = np.round(rotated * (127 / largest)).astype(np.int8)
    norms = np.linalg.norm(values.astype(np.float32), axis=1)
    scales = np.linalg.norm(rotated, axis=1) / np.maximum(norms, 1)
    return mean, scales, values


def make_hartley_matrix(dim: int) -> np.ndarray:
    """Return the discrete Hartley transform as a symmetric orthogonal matrix of shape (D, D), float32."""
    positions = np.arange(dim)
    angles = 2 * np.pi / dim * (np.outer(positions, positions) % dim)
    return ((np.cos(angles) + np.sin(angles)) / np.sqrt(dim)).astype(np.float32)


def _build_text_encoder_settings(model: LLM2CLIP) -> dict[str, Any]:
    """Return the settings with which the page encodes queries exactly as Python does."""
    tokenizer = build_tokenizer(model.encoder)
    checked_texts = (*SAMPLE_TEXTS, *CHECKED_TEXTS)
    return {
        "pad_id": tokenizer.pad_token_id,
        "max_length": tokenizer.model_max_length,
        "final_tokens": count_final_tokens(tokenizer),
        "token_checks": [{"text": text, "ids": tokenizer(text)["input_ids"]} for text in checked_texts],
        "templates": list(model.config.query_templates.templates),
        "max_words": model.config.query_templates.max_words,
        "max_characters": MAX_TEMPLATE_CHARACTERS,
        "wide_ranges": _find_wide_character_ranges(),
    }


def _find_wide_character_ranges() -> list[tuple[int, int]]:
    wide = [code for code in range(0x110000) if unicodedata.east_asian_width(chr(code)) == "W"]
    ranges = []
    for _, group in groupby(enumerate(wide), key=lambda pair: pair[1] - pair[0]):
        codes = [code for _, code in group]
        ranges.append((codes[0], codes[-1]))
    return ranges


def _format_licenses() -> str:
    sections = []
    for package in (ONNXRUNTIME_WEB, TOKENIZERS):
        files = ", ".join(f"lib/{name}" for name in package.files.values())
        sections.append(f"{package.name} {package.version} ({package.license}): {package.homepage}\nFiles: {files}\n")
    copyright_notice = "onnxruntime-web: Copyright (c) Microsoft Corporation. MIT License\n"
    return "\n".join([*sections, copyright_notice, MIT_LICENSE.read_text(encoding="utf-8")])
