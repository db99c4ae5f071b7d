"""Captions in other languages: Flickr30k-CN, COCO-CN, Flickr8k-CN, Crossmodal-3600, XTD10.

The pool is that of one language: its captions against the images, both directions, as in `karpathy`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from llm2clip.data.image_refs import ImageRef, MemoryImage
from llm2clip.evaluate.benchmarks.base import Benchmark, Fields, captioned_records, find_image, image_file
from llm2clip.evaluate.benchmarks.karpathy_splits import COCO, IMAGES, keyed_captions, numbered_captions
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_jsonl, read_lines

XTD10 = {
    **{f"XTD10/test_1kcaptions_{name}.txt": name for name in ("es", "it", "ko", "pl", "ru", "tr", "zh")},
    **{f"MIC/test_1kcaptions_{name}.txt": name for name in ("en", "de", "fr")},
    "STAIR/test_1kcaptions_jp.txt": "ja",
}


def chinese_clip(folder: Path) -> Fields:
    """The form of Chinese-CLIP (arXiv 2211.01335): test_texts.jsonl, {"text_id", "text", "image_ids"}, and
    test_imgs.tsv, "ID<tab>base64"."""
    texts, images = folder / "test_texts.jsonl", folder / "test_imgs.tsv"
    captions: dict[str, list[str]] = {}
    for number, row in read_jsonl(texts):
        if len(row["image_ids"]) != 1:
            raise DataFormatError(
                f"{texts}, line {number}: a text of {len(row['image_ids'])} images; here each has one"
            )
        captions.setdefault(str(row["image_ids"][0]), []).append(row["text"])
    refs: dict[str, ImageRef] = {}
    with images.open(encoding="ascii") as stream:
        for number, line in enumerate(stream, 1):
            key, tab, data = line.rstrip("\n").partition("\t")
            try:
                # Both alphabets of base64 are about.
                decoded = base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)
            except binascii.Error as error:
                raise DataFormatError(f"{images}, line {number}: not an id, a tab and base64 ({error})") from error
            if not tab:
                raise DataFormatError(f"{images}, line {number}: not an id, a tab and base64")
            if key in captions:
                refs[key] = MemoryImage(decoded, f"{images}, line {number}")
    if absent := [key for key in captions if key not in refs]:
        raise DataFormatError(f"{images} has no image {absent[0]}, which {texts} names")
    return {"captions_zh": captioned_records(((refs[key], captions[key]) for key in captions), texts)}


def _flickr30k_cn(folder: Path) -> Fields:
    """1,000 images, 5,000 captions translated by people (arXiv 1708.04390)."""
    if (folder / "test_texts.jsonl").exists():
        return chinese_clip(folder)
    images = [first_existing(folder, *IMAGES["flickr30k"], *(f"../flickr30k/{name}" for name in IMAGES["flickr30k"]))]
    if (folder / "flickr30k_cn_test.txt").exists():
        file = folder / "flickr30k_cn_test.txt"
        captions = keyed_captions(file)
        pairs = ((image_file(images[0], f"{name}.jpg"), texts) for name, texts in captions.items())
        return {"captions_zh": captioned_records(pairs, file)}
    test = first_existing(folder, "flickr30kzhmbosontest")
    file = first_existing(test, "TextData/seg.flickr30kzhmbosontest.caption.txt", "TextData/*.caption.txt")
    names = first_existing(test, "ImageSets/flickr30kzhmbosontest.txt", "ImageSets/*.txt")
    return {"captions_zh": numbered_captions(names, file, images)}


def _coco_cn(folder: Path) -> Fields:
    """1,000 images, the 1,053 captions that people wrote for them (arXiv 1805.08661), and not the translated ones."""
    if (folder / "test_texts.jsonl").exists():
        return chinese_clip(folder)
    names, file = (
        first_existing(folder, "coco-cn_test.txt"),
        first_existing(folder, "imageid.human-written-caption.txt"),
    )
    roots = [r for r in (folder, folder / "images", *(folder.parent / c for c in COCO)) if r.is_dir()]
    images = [root / part for root in roots for part in ("val2014", "train2014") if (root / part).is_dir()]
    if not images:
        raise MissingFileError(f"{folder} has no val2014 and train2014, nor has a folder coco beside it")
    return {"captions_zh": numbered_captions(names, file, images)}


def _flickr8k_cn(folder: Path) -> Fields:
    """The test split's captions written by people, and those that people translated (ICMR 2016,
    10.1145/2911996.2912049)."""
    images = [first_existing(folder, *IMAGES["flickr8k"], *(f"../flickr8k/{name}" for name in IMAGES["flickr8k"]))]
    data = folder / "data" if (folder / "data").is_dir() else folder
    names, fields = first_existing(data, "flickr8ktest.txt"), {}
    for name, key in (
        ("flickr8kzhc.caption.txt", "captions_zh"),
        ("flickr8kzhmtest.captions.txt", "captions_zh_translated"),
    ):
        if (data / name).exists():
            fields[key] = numbered_captions(names, data / name, images)
    if not fields:
        raise MissingFileError(f"{data} has no flickr8kzhc.caption.txt")
    return fields


def _xm3600(folder: Path) -> Fields:
    """3,600 images, all captions of each of 36 languages (arXiv 2205.12522); some tools take the first alone."""
    file = first_existing(folder, "captions.jsonl", "annotations/captions.jsonl")
    images = first_existing(folder, "images")
    captions: dict[str, list[tuple[ImageRef, list[str]]]] = {}
    for number, row in read_jsonl(file):
        if "image/key" not in row:
            raise DataFormatError(f"{file}, line {number}: no image/key")
        for language, there in row.items():
            if isinstance(there, dict) and there.get("caption"):
                image = image_file(images, f"{row['image/key']}.jpg")
                captions.setdefault(f"captions_{language}", []).append((image, there["caption"]))
    return {name: captioned_records(pairs, file) for name, pairs in sorted(captions.items())}


def _xtd10(folder: Path) -> Fields:
    """1,000 images of COCO, one caption in each of 11 languages (arXiv 2012.05107); line i is image i's."""
    names = read_lines(first_existing(folder, "XTD10/test_image_names.txt", "test_image_names.txt"))
    roots = [r for r in (folder, *(folder.parent / name for name in COCO)) if r.is_dir()]
    fields: dict[str, Sequence] = {}
    for file, language in XTD10.items():
        there = next((f for f in (folder / file, folder / Path(file).name) if f.exists()), None)
        if there is None:
            continue
        texts = there.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        if len(texts) != len(names):
            raise DataFormatError(f"{there}: {len(texts)} captions for {len(names)} images")
        refs = []
        for name in names:
            part = "train2014" if "train2014" in name else "val2014"
            refs.append(find_image(roots, f"{part}/{name}"))
        fields[f"captions_{language}"] = captioned_records(((r, [t]) for r, t in zip(refs, texts, strict=True)), there)
    if not fields:
        raise MissingFileError(f"{folder} has no file of captions, such as XTD10/test_1kcaptions_es.txt")
    return fields


BENCHMARKS = (
    Benchmark(
        "flickr30k-cn",
        "retrieval",
        "1,000 images, 5,000 Chinese captions",
        ("flickr30k-cn", "Flickr30k-CN", "flickr30k_cn"),
        _flickr30k_cn,
        "test_texts.jsonl and test_imgs.tsv (Flickr30k-CN.zip of github.com/OFA-Sys/Chinese-CLIP), or "
        "flickr30kzhmbosontest/ (github.com/li-xirong/cross-lingual-cap) and Flickr30k's images",
    ),
    Benchmark(
        "coco-cn",
        "retrieval",
        "1,000 images, 1,053 Chinese captions written by people",
        ("coco-cn", "COCO-CN", "coco_cn"),
        _coco_cn,
        "coco-cn-version1805v1.1.tar.gz (github.com/li-xirong/coco-cn) and COCO's val2014/ and train2014/; or the "
        "form of Chinese-CLIP",
    ),
    Benchmark(
        "flickr8k-cn",
        "retrieval",
        "1,000 images, 5,000 Chinese captions, and 5,000 translated ones",
        ("flickr8k-cn", "flickr8kcn", "Flickr8k-CN"),
        _flickr8k_cn,
        "data/ of github.com/li-xirong/flickr8kcn and Flickr8k's images",
    ),
    Benchmark(
        "xm3600",
        "retrieval",
        "3,600 images, captions in 36 languages",
        ("xm3600", "XM3600", "crossmodal-3600"),
        _xm3600,
        "captions.zip (google.github.io/crossmodal-3600/web-data) and images.tgz "
        "(open-images-dataset.s3.amazonaws.com/crossmodal-3600)",
    ),
    Benchmark(
        "xtd10",
        "retrieval",
        "1,000 images, a caption in each of 11 languages",
        ("xtd10", "XTD10", "Cross-lingual-Test-Dataset-XTD10"),
        _xtd10,
        "github.com/adobe-research/Cross-lingual-Test-Dataset-XTD10, and COCO's train2014/ and val2014/",
    ),
)
