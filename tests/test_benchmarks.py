"""Readers of public benchmarks, each on a tiny folder in the distributed form."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.benchmarks.base import ClassificationData, CompositionalExample
from llm2clip.evaluate.benchmarks.classification import read_class_folders
from llm2clip.evaluate.benchmarks.retrieval import read_first_json_objects
from llm2clip.io_utils import DataFormatError, MissingFileError


def draw(file: Path, colour: tuple[int, int, int] = (200, 10, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(file)


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read(name: str, root: Path) -> Any:
    return BENCHMARKS[name].read(BENCHMARKS[name].find_folder(root))


def names_and_captions(records: Sequence[Record]) -> list[tuple[str, tuple[str, ...]]]:
    return [(Path(str(r.image)).name, r.captions) for r in records]


# ---- retrieval ------------------------------------------------------------------------------------------------------


def karpathy(name: str, rows: list[tuple[str, str, list[str]]], **more: str) -> dict[str, Any]:
    return {
        "dataset": name,
        "images": [
            {"filename": f, "split": split, "imgid": n, "sentences": [{"raw": t, "tokens": t.split()} for t in texts]}
            | more
            for n, (f, split, texts) in enumerate(rows)
        ],
    }


@pytest.mark.parametrize(
    ("name", "image_dir", "more"),
    [
        ("coco", "val2014", {"filepath": "val2014"}),
        ("flickr30k", "flickr30k-images", {}),
        ("flickr8k", "Flicker8k_Dataset", {}),
    ],
)
def test_karpathys_test_splits_are_read(name: str, image_dir: str, more: dict[str, str], tmp_path: Path) -> None:
    """Five and seven captions per image; images of another split need not exist; captions are stripped."""
    rows = [
        ("2.jpg", "test", [f"caption {n} " for n in range(5)]),
        ("3.jpg", "val", ["not this"]),
        ("1.jpg", "test", [f"other {n}" for n in range(7)]),
    ]
    for n in (1, 2):
        draw(tmp_path / name / image_dir / f"{n}.jpg")
    write(tmp_path / name / f"dataset_{name}.json", karpathy(name, rows, **more))
    records = read(name, tmp_path)["captions"]
    assert [len(r.captions) for r in records] == [5, 7] and records[0].captions[4] == "caption 4"
    assert str(records[1].image) == str(tmp_path / name / image_dir / "1.jpg")


def test_long_caption_benchmarks_read_the_first_caption(tmp_path: Path) -> None:
    for n in range(3):
        draw(tmp_path / f"sharegpt4v/sam/images/sa_{n}.jpg")
        draw(tmp_path / f"urban1k/image/{n + 9}.jpg")
        write(tmp_path / f"urban1k/caption/{n + 9}.txt", f"The first line {n}.\nAnd a second.")
        draw(tmp_path / f"docci/images/test_{n}.jpg")
    rows = [
        {"id": n, "image": f"sam/images/sa_{n}.jpg",
         "conversations": [{"value": "<image>"}, {"value": f"One {n}.\nTwo \"[{{\"."}]}
        for n in range(3)
    ]  # fmt: skip
    write(tmp_path / "sharegpt4v/share-captioner_coco_lcs_sam_1246k_1107.json", json.dumps(rows, indent=1))
    records = read("sharegpt4v", tmp_path)["captions"]
    assert names_and_captions(records) == [(f"sa_{n}.jpg", (f'One {n}. Two "[{{".',)) for n in range(3)]
    assert names_and_captions(read("urban1k", tmp_path)["captions"]) == [
        (f"{n}.jpg", (f"The first line {n - 9}.",)) for n in (9, 10, 11)
    ]
    splits = ["test", "qual_test", "test"]
    described = [
        {"example_id": f"test_{n}", "split": split, "image_file": f"test_{n}.jpg", "description": f"It is {n}."}
        for n, split in enumerate(splits)
    ]
    write(tmp_path / "docci/docci_descriptions.jsonlines", "\n".join(map(json.dumps, described)))
    assert [name for name, _ in names_and_captions(read("docci", tmp_path)["captions"])] == ["test_0.jpg", "test_2.jpg"]


def test_read_first_objects_ignores_the_rest_of_the_file(tmp_path: Path) -> None:
    """A truncated end of the file does not matter if it is not reached."""
    rows = [{"n": n, "text": "x" * 5000} for n in range(400)]
    write(tmp_path / "big.json", json.dumps(rows)[:-100_000])
    assert [row["n"] for row in read_first_json_objects(tmp_path / "big.json", 300)] == list(range(300))
    with pytest.raises(DataFormatError, match="object 381 is truncated"):
        read_first_json_objects(tmp_path / "big.json", 400)


@pytest.mark.parametrize("alphabet", [base64.b64encode, base64.urlsafe_b64encode])
def test_flickr30k_cn_reads_chinese_clip_files(tmp_path: Path, alphabet: Callable[[bytes], bytes]) -> None:
    lines = []
    for n in range(3):
        draw(tmp_path / f"{n}.png", (250, 251 + n, 255))
        lines.append(f"{n}\t{alphabet((tmp_path / f'{n}.png').read_bytes()).decode()}")
    write(tmp_path / "flickr30k-cn/test_imgs.tsv", "\n".join(lines) + "\n")
    texts = [{"text_id": n, "text": f"第{n}句", "image_ids": [n % 2]} for n in range(4)]
    write(tmp_path / "flickr30k-cn/test_texts.jsonl", "\n".join(map(json.dumps, texts)))
    records = read("flickr30k-cn", tmp_path)["captions_zh"]
    assert [r.captions for r in records] == [("第0句", "第2句"), ("第1句", "第3句")]
    assert records[1].image is not None and load_image(records[1].image)[1, 0, 0] == 252


def test_xm3600_and_xtd10_read_each_language(tmp_path: Path) -> None:
    for key in ("aa", "bb"):
        draw(tmp_path / f"xm3600/images/{key}.jpg")
    rows = [
        {
            "image/key": "aa",
            "image/locale": "de",
            "de": {"caption": ["ein Hund"]},
            "sw": {"caption": ["mbwa", "ni mbwa"]},
        },
        {"image/key": "bb", "image/locale": "sw", "de": {"caption": ["eine Katze", "sie"]}, "sw": {"caption": []}},
    ]
    write(tmp_path / "xm3600/captions.jsonl", "\n".join(map(json.dumps, rows)))
    fields = read("xm3600", tmp_path)
    assert list(fields) == ["captions_de", "captions_sw"] and len(fields["captions_sw"]) == 1
    assert names_and_captions(fields["captions_de"]) == [("aa.jpg", ("ein Hund",)), ("bb.jpg", ("eine Katze", "sie"))]

    names = ["COCO_train2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"]
    for name, part in zip(names, ("train2014", "val2014"), strict=True):
        draw(tmp_path / f"coco/{part}/{name}")
    write(tmp_path / "xtd10/XTD10/test_image_names.txt", "\n".join(names) + "\n")
    write(tmp_path / "xtd10/XTD10/test_1kcaptions_tr.txt", "bir köpek\nbir kedi\n")
    write(tmp_path / "xtd10/STAIR/test_1kcaptions_jp.txt", "犬\n猫\n")
    fields = read("xtd10", tmp_path)
    assert list(fields) == ["captions_tr", "captions_ja"]
    assert names_and_captions(fields["captions_ja"]) == [(names[0], ("犬",)), (names[1], ("猫",))]
    write(tmp_path / "xtd10/XTD10/test_1kcaptions_ko.txt", "개\n")
    with pytest.raises(DataFormatError, match="1 captions for 2 images"):
        read("xtd10", tmp_path)


# ---- compositional --------------------------------------------------------------------------------------------------


def test_sugarcrepe_reads_each_kind(tmp_path: Path) -> None:
    draw(tmp_path / "coco/val2017/000000000001.jpg")
    kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    for kind in kinds:
        row = {"filename": "000000000001.jpg", "caption": f"{kind} ", "negative_caption": "no"}
        write(tmp_path / f"sugar-crepe/data/{kind}.json", {"0": row, "17": row})
    examples: list[CompositionalExample] = read("sugarcrepe", tmp_path)
    assert [c.kind for c in examples] == [kind for kind in kinds for _ in range(2)]
    assert (examples[0].caption, examples[0].wrong) == ("add_att", "no")
    assert str(examples[0].image).endswith("coco/val2017/000000000001.jpg")


# ---- classification -------------------------------------------------------------------------------------------------


def test_imagenet_reads_the_classes_of_each_variant(tmp_path: Path) -> None:
    """Variants have fewer classes; the folders of V2 are numbers, which must not be sorted as text."""
    for wnid in ("n01443537", "n01440764"):  # goldfish, tench
        draw(tmp_path / f"imagenet/val/{wnid}/a.JPEG")
        draw(tmp_path / f"imagenet-a/{wnid}/a.jpg")
    write(tmp_path / "imagenet-a/README.txt", "classes")
    for name in ("imagenet", "imagenet-a"):
        data: ClassificationData = read(name, tmp_path)
        assert list(data.names) == ["tench", "goldfish"] and list(data.labels) == [0, 1]
        assert len(data.templates) == 80 and all(t.count("{}") == 1 for t in data.templates)
        assert "n01440764" in str(data.images[0])
    for n in range(1000):
        draw(tmp_path / f"imagenetv2/{n}/x.jpeg")
    v2: ClassificationData = read("imagenet-v2", tmp_path)
    at = next(n for n, image in enumerate(v2.images) if "/2/" in str(image))
    assert v2.labels[at] == 2 and v2.names[2] == "great white shark" and len(v2.names) == 1000


def test_cifar_reads_the_binary_form(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    rows = [bytes([1]) + pixels[0].tobytes(), bytes([0]) + pixels[1].tobytes()]
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10/test_batch.bin").write_bytes(b"".join(rows))
    write(tmp_path / "cifar10/batches.meta.txt", "airplane\nautomobile\n\n")
    data: ClassificationData = read("cifar10", tmp_path)
    assert list(data.labels) == [1, 0] and list(data.names) == ["airplane", "automobile"]
    assert np.array_equal(load_image(data.images[1]).numpy(), pixels[1])
    (tmp_path / "cifar-100-binary").mkdir()
    (tmp_path / "cifar-100-binary/test.bin").write_bytes(b"".join(bytes([5]) + row for row in rows))
    write(tmp_path / "cifar-100-binary/fine_label_names.txt", "apple\naquarium_fish\n")
    fine: ClassificationData = read("cifar100", tmp_path)
    assert list(fine.labels) == [1, 0] and fine.names[1] == "aquarium fish"
    (tmp_path / "cifar10/test_batch.bin").write_bytes(rows[0][:-1])
    with pytest.raises(DataFormatError, match="must be a multiple"):
        read("cifar10", tmp_path)


def test_read_class_folders_reads_names_and_templates(tmp_path: Path) -> None:
    for name in ("big_dog", "cat", "empty"):
        (tmp_path / name).mkdir()
    draw(tmp_path / "big_dog/1.png")
    draw(tmp_path / "cat/1.PNG")
    data = read_class_folders(tmp_path)
    assert list(data.names) == ["big dog", "cat"] and list(data.labels) == [0, 1]
    write(tmp_path / "classnames.txt", "cat\ta cat\nbig_dog\ta large dog\n")
    write(tmp_path / "templates.txt", "here is {}\n")
    data = read_class_folders(tmp_path)
    assert list(data.names) == ["a large dog", "a cat"] and list(data.templates) == ["here is {}"]
    write(tmp_path / "templates.txt", "here it is\n")
    with pytest.raises(DataFormatError, match=r"must contain \{\} for the class name"):
        read_class_folders(tmp_path)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_benchmarks_report_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no folder coco or COCO"):
        read("coco", tmp_path)
    (tmp_path / "coco/val2014").mkdir(parents=True)
    with pytest.raises(MissingFileError, match=r"no dataset_coco.json or annotations/dataset_coco.json"):
        read("coco", tmp_path)
    file = tmp_path / "coco/dataset_coco.json"
    write(file, karpathy("coco", [(f"{n}.jpg", "test", ["x"]) for n in range(3)], filepath="val2014"))
    with pytest.raises(MissingFileError, match=r"3 of 3 images .* are missing, e.g. .*0.jpg"):
        read("coco", tmp_path)
    write(file, karpathy("coco", [("../secret.jpg", "test", ["x"])]))
    with pytest.raises(DataFormatError, match="points outside the folder"):
        read("coco", tmp_path)
    write(file, "[{")
    with pytest.raises(DataFormatError, match="not JSON"):
        read("coco", tmp_path)


def test_sizes_of_all_public_benchmarks_are_known() -> None:
    """Otherwise, the report could not say that only a part of a benchmark has been evaluated."""
    sizes = {name: benchmark.size for name, benchmark in BENCHMARKS.items()}
    assert None not in sizes.values()
    assert sizes["coco"] == (5000, "images") and sizes["voc20"] == (1449, "images")
    assert sizes["sugarcrepe"] == (7511, "images") and sizes["coco-boxes"] == (36335, "boxes")
