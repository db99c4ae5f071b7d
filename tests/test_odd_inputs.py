"""Unusual caption files: each is read, or the message says what is wrong with it. docs/howto/data.md lists them."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from format_fixtures import image_bytes
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog

FRENCH = "id,caption\n1,un chien court à travers l’herbe gelée\n2,une fille à vélo\n"
RUSSIAN = "id,caption\n1,Собака бежит по траве\n2,Девочка на велосипеде\n"
JAPANESE = "id,caption\n1,犬が芝生の上を走っている\n2,赤い自転車に乗った少女\n"
PLAIN = "id,caption\n1,a dog\n2,a cat\n"
TWO = [("a dog",), ("a cat",)]
LONG = "word " * 40_000
JSONL = '{"caption": "a dog"}\n{"caption": "a cät"}\n'


@dataclass(frozen=True)
class Case:
    """An unusual source and what reading it gives.

    Attributes:
        files: File names and contents. The first file is the source.
        captions: The captions of each record, or None if the source must be rejected.
        message: Parts of the summary or of the error message.
    """

    files: dict[str, str | bytes]
    captions: list[tuple[str, ...]] | None
    message: tuple[str, ...] = ()


CASES = {
    # long cells and quotes
    "long cell without quotes": Case({"x.csv": f"id,caption\n1,{LONG}\n2,b\n"}, [(LONG.strip(),), ("b",)]),
    "long cell in quotes": Case({"x.csv": f'id,caption\n1,"{LONG}\n{LONG}"\n'}, [(f"{LONG}\n{LONG}".strip(),)]),
    "unclosed quote": Case(
        {"x.csv": 'id,caption\n1,fine\n2,"open\n' + "3,lost\n" * 100_000}, None, ("line 3 is not closed",)
    ),
    "quote closed by a later row": Case(
        {"x.csv": 'id,caption\n1,"open\n2,lost\n3,"also lost"\n' + "4,fine\n"},
        [("fine",)],
        ("3 of 4 rows skipped", "malformed row: 3"),
    ),
    "inch mark in a caption": Case({"x.csv": 'id,caption\n1,a 24" screen\n'}, [('a 24" screen',)]),
    # encodings
    "UTF-8 with byte order mark": Case({"x.csv": b"\xef\xbb\xbf" + PLAIN.encode()}, TWO),
    "UTF-16 (Excel's Unicode text)": Case(
        {"x.csv": PLAIN.replace(",", "\t").encode("utf-16")}, TWO, ("x.csv: read as UTF-16", "separated by tabs")
    ),
    "UTF-16, big-endian": Case({"x.csv": b"\xfe\xff" + PLAIN.encode("utf-16-be")}, TWO, ("read as UTF-16",)),
    "UTF-16 without byte order mark": Case({"x.csv": PLAIN.encode("utf-16-le")}, TWO, ("read as UTF-16-LE",)),
    "UTF-16, truncated": Case(
        {"x.csv": PLAIN.encode("utf-16")[:-3]}, TWO[:1], ("1 of 2 rows skipped (not UTF-8: 1)", "not valid UTF-16")
    ),
    "UTF-32": Case({"x.csv": PLAIN.encode("utf-32")}, TWO, ("read as UTF-32",)),
    "UTF-16 .jsonl": Case({"x.jsonl": JSONL.encode("utf-16")}, [("a dog",), ("a cät",)], ("read as UTF-16",)),
    "UTF-16 .json": Case({"x.json": '[{"caption": "a cät"}]'.encode("utf-16")}, [("a cät",)], ("UTF-16",)),
    "UTF-16 captions.txt": Case({"captions.txt": "a.jpg,ein Mädchen\n".encode("utf-16")}, [("ein Mädchen",)]),
    "cp1252 (Western European)": Case(
        {"x.csv": FRENCH.encode("cp1252")}, None, ("not UTF-8: 2", "cp1252 ('1,un chien court à", "iconv -f")
    ),
    "cp1251 (Cyrillic)": Case({"x.csv": RUSSIAN.encode("cp1251")}, None, ("cp1251 ('1,Собака", "iconv -f ")),
    "Shift-JIS": Case({"x.csv": JAPANESE.encode("shift_jis")}, None, ("shift_jis ('1,犬が", "iconv -f ")),
    "GB18030 .jsonl": Case(
        {"x.jsonl": '{"caption": "一只棕色的狗在草地上奔跑"}\n'.encode("gbk")}, None, ("gb18030 (",)
    ),
    "cp1252 .jsonl.gz": Case(
        {"x.jsonl.gz": gzip.compress(JSONL.encode("cp1252"))},
        [("a dog",)],
        ("not UTF-8: 1", 'cp1252 (\'{"caption": "a cät', "Convert the file to UTF-8"),
    ),
    "cp1252 .json": Case({"x.json": '[{"caption": "a cät"}]'.encode("cp1252")}, None, ("x.json: not UTF-8, prob",)),
    "cp1252 header": Case({"x.csv": "id,légende\n1,a\n".encode("cp1252")}, None, ("decode the header: not UTF-8",)),
    "one damaged line in UTF-8": Case(
        {"x.csv": "id,caption\n1,à vélo\n".encode() + b"2,\xff\n"}, [("à vélo",)], ("1 of 2 rows skipped (not UTF-8",)
    ),
    "cp1252 text beside an image": Case(
        {"photos/a.jpg": image_bytes(0), "photos/a.txt": "un café".encode("cp1252")}, None, ("a.txt: not UTF-8, prob",)
    ),
    # line ends and empty files
    "Windows and old Mac line ends": Case({"x.csv": "id,caption\r\n1,a dog\r2,a cat\r"}, TWO),
    "JSON list in a .jsonl": Case({"x.jsonl": '[{"caption": "a"}]'}, None, ("malformed row: not a JSON object",)),
    "JSON lines in a .json": Case({"x.json": JSONL}, None, ("not JSON", "change its suffix to .jsonl")),
    "header without rows": Case({"x.csv": "id,caption\n"}, None, ("x.csv: no records",)),
    "empty file": Case({"x.csv": ""}, None, ("x.csv: no records",)),
    # delimiters
    "semicolons": Case({"x.csv": PLAIN.replace(",", ";")}, TWO, ("x.csv: fields separated by semicolons",)),
    "semicolons, captions with commas": Case(
        {"x.csv": 'id;caption\n1;a dog, a cat, both\n2;"a; b"\n'}, [("a dog, a cat, both",), ("a; b",)]
    ),
    "commas, captions with semicolons": Case({"x.csv": "id,caption\n1,a dog; a cat\n"}, [("a dog; a cat",)]),
    "tabs in a .csv": Case({"x.csv": PLAIN.replace(",", "\t")}, TWO, ("separated by tabs",)),
    "commas in a .tsv": Case({"x.tsv": PLAIN}, TWO, ("x.tsv: fields separated by commas",)),
    "Excel's sep= line": Case({"x.csv": "sep=;\nid;caption\n1;a dog\n2;a cat\n"}, TWO, ("by semicolons",)),
    "Flickr30k's results.csv": Case(
        {"results.csv": "image_name| comment_number| comment\na.jpg| 0| Two men .\na.jpg| 1| A man , too .\n"},
        [("Two men .", "A man , too .")],
    ),
    # column names and missing values
    "capitals": Case({"x.csv": "Image,Caption\na.jpg,a dog\n"}, [("a dog",)]),
    "capitals and spaces": Case({"x.csv": "FILE NAME,Long-Caption\na.jpg,a dog\n"}, [("a dog",)]),
    "capitals in .jsonl": Case({"x.jsonl": '{"FILE_NAME": "a.jpg", "Captions": ["a", "b"]}\n'}, [("a", "b")]),
    "missing values": Case(
        {"x.csv": "id,caption,caption\n1,a dog,NaN\n2,null,a cat\n3,N/A,<NA>\n4,#N/A,None\n5,Nan bread,none of it\n"},
        [("a dog",), ("a cat",), ("Nan bread", "none of it")],
        ("2 of 5 rows skipped (no caption: 2)", "dropped values (missing value: 4)"),
    ),
}


COCO = {
    "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 25, "file_name": "000000000025.jpg", "license": 1}],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "a dog "},
        {"id": 2, "image_id": 25, "caption": "a cat"},
        {"id": 3, "image_id": 9, "caption": "it runs"},
    ],
}
CASES |= {
    "COCO with an unknown image": Case(
        {"x.json": json.dumps(COCO | {"images": COCO["images"][:1]})},
        [("a dog", "it runs")],
        ("1 of 2 rows skipped (malformed row: 1)",),
    ),
    "COCO's bounding boxes": Case(
        {"instances.json": json.dumps(COCO | {"annotations": [{"image_id": 9, "bbox": [0, 0, 1, 1]}]})},
        None,
        ("the annotations have no captions. Use COCO's captions_*.json",),
    ),
    "another JSON object": Case({"x.json": '{"data": []}'}, None, ("must contain a list of objects", "keys data")),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_input_is_read_or_explained(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    captions, message = read_case(case, tmp_path)
    assert captions == case.captions, message
    for part in case.message:
        assert part in message


def read_case(case: Case, folder: Path) -> tuple[list[tuple[str, ...]] | None, str]:
    """Write the files of a case, and read the first one. Return the captions, if any, and the summary or the error.

    Two thirds of the rows may be skipped, so that a source with a single bad row among two or three is read.
    """
    for file, content in case.files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
    source = folder / next(iter(case.files))
    log = SkipLog(max_skipped=0.75)
    try:
        records = list(open_records(source.parent if source.suffix == ".jpg" else source, log, "unchecked"))
    except ValueError as error:
        return None, str(error)
    return [record.texts for record in records], log.summary()
