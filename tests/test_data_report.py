"""The command `llm2clip data` and its page."""

import json
import re
import sys
from pathlib import Path

import pytest

from format_fixtures import image_bytes, write_jsonl
from llm2clip.cli import main
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.tools.data_report import get_evenly_spaced_indices, read_first_skipped_rows, sample_texts

SCRIPT = "<script>alert(1)</script>"


def run_data(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """Run the command and return what it prints, with single spaces."""
    assert main(["data", *map(str, args)]) == 0
    return re.sub(r" +", " ", capsys.readouterr().out)


def test_data_command_counts_images_captions_and_splits(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "new/data.html"
    text = run_data(capsys, image_folder, "--report", page)
    rows = [json.loads(line) for line in (image_folder / "captions.jsonl").read_text().splitlines()]
    captions = [caption for row in rows for caption in row["captions"]]
    words = sorted(len(caption.split()) for caption in captions)
    num_val = sum(row["split"] == "val" for row in rows)
    assert text.startswith(f"36 images with {len(captions) + 36} captions. `fit` would hold out only {num_val} images,")
    for line in (
        "images 36",
        f"captions {len(captions)}",
        "long captions 36",
        "rows skipped 0",
        f"{36 - num_val} training images, {num_val} held out.",
        f"val {num_val} {num_val}",
        f"captions (words) 36 {len(captions)} {words[len(captions) // 2]} {words[-1]} {words[-1]}",
        "Captions per image: mean 3.5, median 3, maximum 4.",
        "width 48 48 48 48 48",
        "Images with a shorter side of less than 224 pixels: 36 (100.0%).",
        "png 36",
        "No rows are skipped.",
        f"Report: {page}",
        f"Next: llm2clip fit {image_folder} --out RUN",
    ):
        assert f"{line}\n" in text, line
    html = page.read_text()
    assert html.count("<article>") == html.count("data:image/jpeg;base64,") == 24 and html.count("<svg") == 2
    assert rows[0]["long_captions"][0] in html and rows[-1]["captions"][0] in html


def test_data_command_without_the_reports_extra_names_it(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("matplotlib", "py3langid"):
        monkeypatch.setitem(sys.modules, module, None)
    text = run_data(capsys, image_folder, "--report", tmp_path / "data.html")
    assert "Languages of" not in text
    assert "To identify the languages of captions, install py3langid: `pip install 'llm2clip[reports]'`.\n" in text
    assert "<svg" not in (tmp_path / "data.html").read_text()


def test_data_page_shows_broken_images_and_escapes_all_texts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows over the limit of `fit` are reported rather than raised."""
    (tmp_path / "<b>.jpg").write_bytes(image_bytes(0, "JPEG"))
    png = image_bytes(1, "PNG")
    (tmp_path / "broken.png").write_bytes(png[: len(png) // 2])
    long_text = "word " * 10_000
    rows = [
        {"image": "<b>.jpg", "captions": [SCRIPT, "\u202edog \x1b[31m", long_text], "split": SCRIPT, "id": SCRIPT},
        {"image": "broken.png", "captions": ["a cat"], "phrases": [SCRIPT]},
        {"image": f"{SCRIPT}.png", "captions": ["missing"]},
        {"captions": ["no image"]},
    ]
    page = tmp_path / "data.html"
    text = run_data(capsys, write_jsonl(tmp_path / "rows.jsonl", rows), "--report", page)
    assert text.startswith(
        "`fit` would fail: 25.0% of the rows cannot be used. Most common reason: missing image (1 row)."
    )
    assert "records without an image 1\n" in text and "\x1b" not in text
    assert "25.0% of the rows are skipped. `fit` accepts at most 5%" in text and "missing image 1\n" in text
    html = page.read_text()
    assert SCRIPT not in html and "&lt;script&gt;" in html and "&lt;b&gt;.jpg" in html
    assert "broken.png: unreadable image" in html and html.count("data:image/jpeg") == 1
    assert html.count("word word") < 1000 and "(49,999 characters)" in html


def test_data_command_describes_texts_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(
        tmp_path / "texts.jsonl", [{"captions": [f"Zwei Hunde spielen im Garten {n}"]} for n in range(9)]
    )
    text = run_data(capsys, file, "--report", tmp_path / "data.html")
    assert "No record has an image, so only `tune` and `embed` can use the 9 captions.\n" in text
    assert "records without an image 9\n" in text and "Only `tune` and `embed` accept text-only data." in text
    assert "de 100.0%\n" in text and "shorter side" not in text


def test_data_command_describes_images_without_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number, "JPEG"))
    for name in ("broken.jpg", "a.mp4", "b.MP4", "notes.pdf", "frame.1", "Dr. Smith", ".x.mp4", "a.\udcff\udcfe"):
        (tmp_path / name).write_bytes(b"x")
    text = run_data(capsys, tmp_path, "--report", tmp_path / "new/data.html")
    assert text.startswith("3 images without captions. Training requires captions.\n")
    assert "rows skipped 1\n" in text and "unreadable image 1\n" in text and "Captions" not in text
    assert f"Next: llm2clip caption {tmp_path} --model MODEL --out captions.jsonl" in text
    assert f"Next: llm2clip index {tmp_path} --out INDEX" in text
    assert ".mp4 2\n" in text and ".pdf 1\n" in text and "smith" not in text and ".jpg 4" not in text
    assert f"llm2clip index {tmp_path} --out INDEX" in (tmp_path / "new/data.html").read_text()


def test_data_command_writes_only_html_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_jsonl(tmp_path / "texts.jsonl", [{"captions": ["a"]}])
    content = file.read_text()
    assert main(["data", str(file), "--report", str(file)]) == 1
    assert "--report must be an .html file" in capsys.readouterr().err and file.read_text() == content


def test_first_skipped_rows_of_each_reason_are_listed(tmp_path: Path) -> None:
    log = SkipLog(tmp_path / "log.jsonl", max_skipped=1.0)
    for row in range(10):
        log.skip("a\udcff.csv", row, "no caption" if row % 2 else "missing image", f"\x00{row}\udcff")
    rows = read_first_skipped_rows(tmp_path / "log.jsonl")
    assert [row for _, row, _, _ in rows] == [0, 2, 4, 1, 3, 5]
    assert rows[0] == ("a\\udcff.csv", 0, "missing image", "\x000\\udcff")


def test_texts_are_sampled_evenly() -> None:
    records = [Record(str(n), None, (f"{n}a", f"{n}b") if n % 2 else (), (f"{n}s",)) for n in range(1000)]
    table = RecordTable.from_records(records)
    texts = list(sample_texts(table, "captions", 100))
    assert len(texts) == 100 and texts[:2] == ["1a", "1b"] and texts[-1] == "999b"
    gaps = {int(later[:-1]) - int(earlier[:-1]) for earlier, later in zip(texts[::2], texts[2::2], strict=False)}
    assert gaps <= {20, 22}
    assert len(list(sample_texts(table, "short_captions", 5000))) == 1000
    assert list(sample_texts(table, "long_captions", 10)) == []
    assert get_evenly_spaced_indices(3, 24).tolist() == [0, 1, 2] and get_evenly_spaced_indices(0, 24).tolist() == []


@pytest.mark.data
def test_data_command_describes_flickr8k(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_data(capsys, real_data / "flickr8k/captions.jsonl", "--report", tmp_path / "data.html")
    rows = [json.loads(line) for line in (real_data / "flickr8k/captions.jsonl").read_text().splitlines()]
    captions = [caption for row in rows for caption in row["captions"]]
    words = sorted(len(caption.split()) for caption in captions)
    assert f"images {len(rows):,}\n" in text and f"captions {len(captions):,}\n" in text
    assert f"captions (words) {len(rows):,} {len(captions):,} {words[len(words) // 2]} " in text
    share = float(re.search(r"\nen (\d+\.\d)%", text)[1])  # type: ignore[index]
    assert share > 99
