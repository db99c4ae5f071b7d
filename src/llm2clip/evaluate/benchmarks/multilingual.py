"""Multilingual retrieval benchmarks: Flickr30k-CN, COCO-CN, Flickr8k-CN, Crossmodal-3600 and XTD10.

Each language is evaluated separately, in both directions. `english.py` describes the protocol.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from llm2clip.data.image_refs import ImageRef, MemoryImage
from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks.base import (
    Benchmark,
    CaptionFields,
    find_image_file,
    image_file,
    make_captioned_records,
)
from llm2clip.evaluate.benchmarks.english import (
    COCO_FOLDERS,
    IMAGE_FOLDERS,
    read_caption_lines,
    read_listed_images,
)
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_jsonl, read_lines

XTD10_FILES = {
    **{f"XTD10/test_1kcaptions_{name}.txt": name for name in ("es", "it", "ko", "pl", "ru", "tr", "zh")},
    **{f"MIC/test_1kcaptions_{name}.txt": name for name in ("en", "de", "fr")},
    "STAIR/test_1kcaptions_jp.txt": "ja",
}


def read_chinese_clip(folder: Path) -> CaptionFields:
    """Read a benchmark in Chinese-CLIP's format (arXiv 2211.01335).

    Each line of test_texts.jsonl has the form {"text_id", "text", "image_ids"}. Each line of test_imgs.tsv has the form
    "ID<tab>BASE64".
    """
    texts, images = folder / "test_texts.jsonl", folder / "test_imgs.tsv"
    captions: dict[str, list[str]] = {}
    for number, row in read_jsonl(texts):
        if len(row["image_ids"]) != 1:
            raise DataFormatError(f"{texts}, line {number}: expected one image id, found {len(row['image_ids'])}")
        captions.setdefault(str(row["image_ids"][0]), []).append(row["text"])
    refs = _read_base64_images(images, set(captions))
    for key in captions:
        if key not in refs:
            raise DataFormatError(f"{images} has no image {key}, which is listed in {texts}")
    return {"captions_zh": make_captioned_records(((refs[key], captions[key]) for key in captions), texts)}


def _read_base64_images(file: Path, ids: set[str]) -> dict[str, ImageRef]:
    """Read the images with the given ids from a file of "ID<tab>BASE64" lines."""
    refs: dict[str, ImageRef] = {}
    with file.open(encoding="ascii") as stream:
        for number, line in enumerate(stream, 1):
            key, tab, data = line.rstrip("\n").partition("\t")
            try:
                # Some files use the standard base64 alphabet, others the URL-safe one.
                image = base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)
            except binascii.Error as error:
                raise DataFormatError(f"{file}, line {number}: expected an id, a tab and base64 ({error})") from error
            if not tab:
                raise DataFormatError(f"{file}, line {number}: expected an id, a tab and base64")
            if key in ids:
                refs[key] = MemoryImage(image, f"{file}, line {number}")
    return refs


def _read_flickr30k_cn(folder: Path) -> CaptionFields:
    """Read 1,000 images with 5,000 human-translated captions (arXiv 1708.04390)."""
    if (folder / "test_texts.jsonl").exists():
        return read_chinese_clip(folder)
    image_dir = _find_image_dir(folder, "flickr30k")
    file = folder / "flickr30k_cn_test.txt"
    if file.exists():
        pairs = [(image_file(image_dir, f"{name}.jpg"), texts) for name, texts in read_caption_lines(file).items()]
        return {"captions_zh": make_captioned_records(pairs, file)}
    test_dir = first_existing(folder, "flickr30kzhmbosontest")
    captions = first_existing(test_dir, "TextData/seg.flickr30kzhmbosontest.caption.txt", "TextData/*.caption.txt")
    names = first_existing(test_dir, "ImageSets/flickr30kzhmbosontest.txt", "ImageSets/*.txt")
    return {"captions_zh": read_listed_images(names, captions, [image_dir])}


def _read_coco_cn(folder: Path) -> CaptionFields:
    """Read 1,000 images with 1,053 human-written captions (arXiv 1805.08661). The translated captions are not used."""
    if (folder / "test_texts.jsonl").exists():
        return read_chinese_clip(folder)
    names = first_existing(folder, "coco-cn_test.txt")
    captions = first_existing(folder, "imageid.human-written-caption.txt")
    roots = [folder, folder / "images", *(folder.parent / name for name in COCO_FOLDERS)]
    candidates = [root / split for root in roots for split in ("val2014", "train2014")]
    image_dirs = [candidate for candidate in candidates if candidate.is_dir()]
    if not image_dirs:
        raise MissingFileError(f"no val2014 or train2014 folder in {folder} or in a coco folder next to it")
    return {"captions_zh": read_listed_images(names, captions, image_dirs)}


def _read_flickr8k_cn(folder: Path) -> CaptionFields:
    """Read two sets of test captions, human-written and human-translated (ICMR 2016, doi 10.1145/2911996.2912049)."""
    image_dir = _find_image_dir(folder, "flickr8k")
    data_dir = folder / "data" if (folder / "data").is_dir() else folder
    names = first_existing(data_dir, "flickr8ktest.txt")
    files = {
        "captions_zh": data_dir / "flickr8kzhc.caption.txt",
        "captions_zh_translated": data_dir / "flickr8kzhmtest.captions.txt",
    }
    fields = {}
    for field, file in files.items():
        if file.exists():
            fields[field] = read_listed_images(names, file, [image_dir])
    if not fields:
        raise MissingFileError(f"{data_dir} has no flickr8kzhc.caption.txt")
    return fields


def _find_image_dir(folder: Path, dataset: str) -> Path:
    """Return the image folder of `dataset` (flickr30k or flickr8k).

    The images are either in the benchmark's own folder or in a folder named after `dataset` next to it.
    """
    names = IMAGE_FOLDERS[dataset]
    return first_existing(folder, *names, *(f"../{dataset}/{name}" for name in names))


def _read_xm3600(folder: Path) -> CaptionFields:
    """Read 3,600 images with captions in 36 languages (arXiv 2205.12522).

    All captions are used, whereas some evaluation tools use only each image's first caption per language.
    """
    file = first_existing(folder, "captions.jsonl", "annotations/captions.jsonl")
    image_dir = first_existing(folder, "images")
    pairs: dict[str, list[tuple[ImageRef, list[str]]]] = {}
    for number, row in read_jsonl(file):
        if "image/key" not in row:
            raise DataFormatError(f"{file}, line {number}: no image/key")
        image = image_file(image_dir, f"{row['image/key']}.jpg")
        for language, value in row.items():
            if isinstance(value, dict) and value.get("caption"):
                pairs.setdefault(f"captions_{language}", []).append((image, value["caption"]))
    return {field: make_captioned_records(field_pairs, file) for field, field_pairs in sorted(pairs.items())}


def _read_xtd10(folder: Path) -> CaptionFields:
    """Read 1,000 COCO images with one caption in each of 11 languages (arXiv 2012.05107).

    Line i of each caption file is the caption of image i.
    """
    names = read_lines(first_existing(folder, "XTD10/test_image_names.txt", "test_image_names.txt"))
    roots = [root for root in (folder, *(folder.parent / name for name in COCO_FOLDERS)) if root.is_dir()]
    refs = []
    for name in names:
        split = "train2014" if "train2014" in name else "val2014"
        refs.append(find_image_file(roots, f"{split}/{name}"))
    fields: dict[str, list[Record]] = {}
    for name, language in XTD10_FILES.items():
        file = next((path for path in (folder / name, folder / Path(name).name) if path.exists()), None)
        if file is not None:
            fields[f"captions_{language}"] = _read_parallel_captions(file, refs)
    if not fields:
        raise MissingFileError(f"{folder} has no caption files, such as XTD10/test_1kcaptions_es.txt")
    return fields


def _read_parallel_captions(file: Path, refs: Sequence[ImageRef]) -> list[Record]:
    """Read captions from a file in which line i is the caption of image i. Blank lines are not skipped."""
    captions = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(captions) != len(refs):
        raise DataFormatError(f"{file}: {len(captions)} captions for {len(refs)} images")
    return make_captioned_records(((ref, [caption]) for ref, caption in zip(refs, captions, strict=True)), file)


BENCHMARKS = (
    Benchmark(
        name="flickr30k-cn",
        kind="retrieval",
        description="1,000 images, 5,000 Chinese captions",
        folders=("flickr30k-cn", "Flickr30k-CN", "flickr30k_cn"),
        read=_read_flickr30k_cn,
        source="test_texts.jsonl and test_imgs.tsv (Flickr30k-CN.zip from github.com/OFA-Sys/Chinese-CLIP), or "
        "flickr30kzhmbosontest/ (github.com/li-xirong/cross-lingual-cap) and Flickr30k's images",
    ),
    Benchmark(
        name="coco-cn",
        kind="retrieval",
        description="1,000 images, 1,053 human-written Chinese captions",
        folders=("coco-cn", "COCO-CN", "coco_cn"),
        read=_read_coco_cn,
        source="coco-cn-version1805v1.1.tar.gz (github.com/li-xirong/coco-cn) and COCO's val2014/ and train2014/; or "
        "files in Chinese-CLIP's format",
    ),
    Benchmark(
        name="flickr8k-cn",
        kind="retrieval",
        description="1,000 images, 5,000 human-written and 5,000 translated Chinese captions",
        folders=("flickr8k-cn", "flickr8kcn", "Flickr8k-CN"),
        read=_read_flickr8k_cn,
        source="data/ (github.com/li-xirong/flickr8kcn) and Flickr8k's images",
    ),
    Benchmark(
        name="xm3600",
        kind="retrieval",
        description="3,600 images, captions in 36 languages",
        folders=("xm3600", "XM3600", "crossmodal-3600"),
        read=_read_xm3600,
        source="captions.zip (google.github.io/crossmodal-3600/web-data) and images.tgz "
        "(open-images-dataset.s3.amazonaws.com/crossmodal-3600)",
    ),
    Benchmark(
        name="xtd10",
        kind="retrieval",
        description="1,000 images, one caption in each of 11 languages",
        folders=("xtd10", "XTD10", "Cross-lingual-Test-Dataset-XTD10"),
        read=_read_xtd10,
        source="github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10, and COCO's train2014/ and val2014/",
    ),
)
