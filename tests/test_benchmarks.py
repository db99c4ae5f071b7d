"""Readers of public benchmarks, each on a tiny folder in the distributed form."""

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.benchmarks.base import ClassificationData, CompositionalExample
from llm2clip.evaluate.benchmarks.classification import read_class_folders
from llm2clip.evaluate.benchmarks.retrieval import read_first_objects, strip_tags
from llm2clip.io_utils import DataFormatError, MissingFileError


def draw(file: Path, colour: tuple[int, int, int] = (200, 10, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(file)


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")


def read(name: str, root: Path) -> Any:
    return BENCHMARKS[name].read(BENCHMARKS[name].find(root))


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
    ("name", "image_dir", "more", "blip_file"),
    [
        ("coco", "val2014", {"filepath": "val2014"}, "annotations/coco_karpathy_test.json"),
        ("flickr30k", "flickr30k-images", {}, "flickr30k_test.json"),
    ],
)
def test_coco_and_flickr30k_read_karpathy_and_blip_files(
    name: str, image_dir: str, more: dict[str, str], blip_file: str, tmp_path: Path
) -> None:
    """Five and seven captions per image; images of another split need not exist; captions are stripped."""
    rows = [
        ("2.jpg", "test", [f"caption {n} " for n in range(5)]),
        ("3.jpg", "val", ["not this"]),
        ("1.jpg", "test", [f"other {n}" for n in range(7)]),
    ]
    for n in (1, 2):
        draw(tmp_path / name / image_dir / f"{n}.jpg")
    file = tmp_path / name / f"dataset_{name}.json"
    write(file, karpathy(name, rows, **more))
    records = read(name, tmp_path)["captions"]
    assert [len(r.captions) for r in records] == [5, 7] and records[0].captions[4] == "caption 4"
    assert str(records[1].image).endswith(f"{image_dir}/1.jpg")
    file.unlink()
    lists = [{"image": f"{image_dir}/{f}", "caption": texts} for f, split, texts in rows if split == "test"]
    write(tmp_path / name / blip_file, lists)
    assert read(name, tmp_path)["captions"] == records


def test_flickr8k_reads_its_token_file(tmp_path: Path) -> None:
    folder = tmp_path / "flickr8k"
    draw(folder / "Flicker8k_Dataset/10_a.jpg")
    write(folder / "Flickr8k_text/Flickr_8k.testImages.txt", "10_a.jpg\n")
    lines = ["10_a.jpg#0\tA dog runs .", "2258277193_586949ec62.jpg.1#0\tNobody .", "10_a.jpg#1\tIt is # 1 ."]
    write(folder / "Flickr8k_text/Flickr8k.token.txt", "\n".join(lines))
    assert names_and_captions(read("flickr8k", tmp_path)["captions"]) == [("10_a.jpg", ("A dog runs .", "It is # 1 ."))]


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
    assert [row["n"] for row in read_first_objects(tmp_path / "big.json", 300)] == list(range(300))
    with pytest.raises(DataFormatError, match="object 381 is truncated"):
        read_first_objects(tmp_path / "big.json", 400)


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


def test_flickr30k_cn_reads_segmented_captions(tmp_path: Path) -> None:
    """Captions with segmented and tagged words; the images are in Flickr30k's folder."""
    draw(tmp_path / "flickr30k/flickr30k-images/17.jpg")
    test = tmp_path / "flickr30k-cn/flickr30kzhmbosontest"
    write(test / "ImageSets/flickr30kzhmbosontest.txt", "17\n")
    lines = ["17#zhm#0 一个:m 男人:n ，:wd 跑步:v", "18#zhm#0 没有:v", "17#zhm#1 他:r 走:v"]
    write(test / "TextData/seg.flickr30kzhmbosontest.caption.txt", "\n".join(lines))
    assert names_and_captions(read("flickr30k-cn", tmp_path)["captions_zh"]) == [("17.jpg", ("一个男人，跑步", "他走"))]
    assert strip_tags("a dog at 10:30 runs") == "a dog at 10:30 runs"


def test_coco_cn_reads_captions_written_by_people(tmp_path: Path) -> None:
    """Images are in two folders of COCO; the last line of the list has no newline."""
    names = ["COCO_train2014_000000000001", "COCO_val2014_000000000002"]
    for name, part in zip(names, ("train2014", "val2014"), strict=True):
        draw(tmp_path / f"coco/{part}/{name}.jpg")
    write(tmp_path / "coco-cn/coco-cn_test.txt", "\n".join(names))
    lines = [
        f"{names[1]}#0\t一只猫",
        f"{names[0]}#0\t一辆车",
        f"{names[0]}#1\t红车",
        "COCO_val2014_000000000009#0\t别的",
    ]
    write(tmp_path / "coco-cn/imageid.human-written-caption.txt", "\n".join(lines))
    write(tmp_path / "coco-cn/imageid.manually-translated-caption.txt", f"{names[0]}#0\t不要这个")
    records = read("coco-cn", tmp_path)["captions_zh"]
    assert names_and_captions(records) == [(f"{names[0]}.jpg", ("一辆车", "红车")), (f"{names[1]}.jpg", ("一只猫",))]


def test_flickr8k_cn_groups_captions_that_are_not_adjacent(tmp_path: Path) -> None:
    for name in ("1_a", "2_b"):
        draw(tmp_path / f"flickr8k/Flicker8k_Dataset/{name}.jpg")
    write(tmp_path / "flickr8kcn/data/flickr8ktest.txt", "2_b\n1_a\n")
    lines = [f"{name}.jpg#zhc#{n} {name} 第{n}" for n in range(2) for name in ("1_a", "3_c", "2_b")]
    write(tmp_path / "flickr8kcn/data/flickr8kzhc.caption.txt", "\n".join(lines))
    write(tmp_path / "flickr8kcn/data/flickr8kzhmtest.captions.txt", "2_b.jpg#zhm#0 译\n1_a.jpg#zhm#0 文")
    fields = read("flickr8k-cn", tmp_path)
    assert names_and_captions(fields["captions_zh"]) == [
        ("2_b.jpg", ("2_b 第0", "2_b 第1")),
        ("1_a.jpg", ("1_a 第0", "1_a 第1")),
    ]
    assert names_and_captions(fields["captions_zh_translated"]) == [("2_b.jpg", ("译",)), ("1_a.jpg", ("文",))]


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


def test_winoground_reads_images_with_and_without_suffix(tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": 7, "caption_0": "a man on a dog", "caption_1": "a dog on a man"}
    for n, suffix in enumerate(("", ".png")):
        draw(tmp_path / f"winoground/images/ex_7_img_{n}.png")
        row[f"image_{n}"] = f"ex_7_img_{n}{suffix}"
    write(tmp_path / "winoground/examples.jsonl", json.dumps(row))
    [example] = read("winoground", tmp_path)
    assert example.captions == ("a man on a dog", "a dog on a man") and (example.id, example.kind) == (
        "7",
        "winoground",
    )
    assert [Path(str(image)).name for image in example.images] == ["ex_7_img_0.png", "ex_7_img_1.png"]


def test_sugarcrepe_reads_each_kind(tmp_path: Path) -> None:
    draw(tmp_path / "coco/val2017/000000000001.jpg")
    kinds = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
    for kind in kinds:
        row = {"filename": "000000000001.jpg", "caption": f"{kind} ", "negative_caption": "no"}
        write(tmp_path / f"sugar-crepe/data/{kind}.json", {"0": row, "17": row})
    examples: list[CompositionalExample] = read("sugarcrepe", tmp_path)
    assert [c.kind for c in examples] == [kind for kind in kinds for _ in range(2)]
    assert examples[1].id == "add_att 17" and examples[0].captions == ("add_att", "no") and len(examples[0].images) == 1


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


def test_objectnet_removes_the_border(tmp_path: Path) -> None:
    root = tmp_path / "objectnet-1.0"
    write(root / "mappings/folder_to_objectnet_label.json", {"air_fan": "Air fan", "chair": "Chair"})
    write(root / "mappings/objectnet_to_imagenet_1k.json", {"Chair": "folding chair; rocking chair"})
    draw(root / "images/air_fan/1.png")
    draw(root / "images/chair/1.png", (255, 0, 0))
    with Image.open(root / "images/chair/1.png") as image:
        image.paste((0, 0, 255), (2, 2, 10, 8))
        image.save(root / "images/chair/1.png")
    data: ClassificationData = read("objectnet", tmp_path)
    assert list(data.names) == ["chair"] and len(data.images) == 1
    pixels = load_image(data.images[0])
    assert pixels.shape == (3, 6, 8) and pixels[0].max() == 0 and pixels[2].min() == 255
    assert data.images[0].key != FileImage(str(root / "images/chair/1.png")).key, "the embedding differs"


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
    with pytest.raises(DataFormatError, match="not a multiple"):
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
    with pytest.raises(DataFormatError, match=r"no \{\} for the class name"):
        read_class_folders(tmp_path)


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_benchmarks_report_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="no folder coco or COCO"):
        read("coco", tmp_path)
    (tmp_path / "coco/val2014").mkdir(parents=True)
    with pytest.raises(MissingFileError, match=r"no coco_karpathy_test.json or annotations/coco_karpathy_test.json"):
        read("coco", tmp_path)
    write(tmp_path / "coco/coco_karpathy_test.json", [{"image": "val2014/a.jpg", "caption": ["x"]}] * 3)
    with pytest.raises(MissingFileError, match=r"3 of 3 images .* are missing, e.g. .*a.jpg"):
        read("coco", tmp_path)
    write(tmp_path / "coco/coco_karpathy_test.json", [{"image": "../secret.jpg", "caption": ["x"]}])
    with pytest.raises(DataFormatError, match="points outside the folder"):
        read("coco", tmp_path)
    write(tmp_path / "coco/coco_karpathy_test.json", "[{")
    with pytest.raises(DataFormatError, match="not JSON"):
        read("coco", tmp_path)


def test_sizes_of_all_public_benchmarks_are_known() -> None:
    """Otherwise, the report could not say that only a part of a benchmark has been evaluated."""
    sizes = {name: benchmark.size for name, benchmark in BENCHMARKS.items()}
    assert None not in sizes.values()
    assert sizes["coco"] == (5000, "images") and sizes["voc20"] == (1449, "images")
    assert sizes["winoground"] == (400, "pairs") and sizes["coco-boxes"] == (36335, "boxes")
