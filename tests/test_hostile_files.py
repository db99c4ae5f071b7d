"""Files that were made to exhaust time or memory, or to reach files outside their folder."""

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
from collections import OrderedDict
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile

import hostile_fixtures as hostile
from format_fixtures import encode, write_jsonl
from llm2clip.cli.export import _check_for_home_paths
from llm2clip.data import image_header, images, records, table_cells
from llm2clip.data.formats import text_files
from llm2clip.data.image_header import DecodingLimitError, check_decoding_cost, open_image_header
from llm2clip.data.image_refs import FileImage, ParquetImage
from llm2clip.data.images import ImageError, decode_image, load_image
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.io_utils import DataFormatError, atomic_dir, atomic_path
from llm2clip.models.gguf import check_gguf_header
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower, build_backbone
from llm2clip.runs.ranks import print_once
from llm2clip.search.build import scan_source
from llm2clip.search.images import ImageTooLargeError, load_query_image, load_request_image
from llm2clip.search.types import IndexedImage

FIXTURES = Path(__file__).parent / "fixtures"


def png_bytes(width: int = 12, height: int = 10) -> bytes:
    return encode(Image.new("RGB", (width, height), (200, 10, 10)), "PNG")


# ---- images: the work of decoding -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpeg refinement scans", "must have at most 20 scans"),
        ("jpeg arithmetic", "arithmetic coding"),
        ("png chunks", "too many small chunks"),
        ("png profiles", "too many small chunks"),
        ("png profiles after pixels", "colour profiles"),
        ("gif comments", "too many small chunks"),
        ("gif long comment", "too many small chunks"),
        ("bmp runs", "run-length encoded"),
        ("bmp jumps", "run-length encoded"),
        ("ppm comments", "plain-text"),
        ("ppm numbers", "plain-text"),
        ("tiff shared strips", "overlap"),
        ("tiff large tiles", "tiles of the TIFF"),
        ("tiff huge tile", "tiles of the TIFF"),
        ("tiff progressive jpeg", "progressive"),
    ],
)
def test_decode_image_rejects_hostile_files_before_decoding(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_decode_with_torchvision", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ImageError, match=message):
        decode_image(hostile.REJECTED[name]())


@pytest.mark.parametrize("name", ["png chunks after pixels", "png empty pixels"])
def test_decode_image_limits_the_reads_of_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_FAST_FORMATS", ())
    with pytest.raises(ImageError, match="too many small chunks"):
        decode_image(hostile.REJECTED[name]())


def test_jpeg_scans_are_limited_by_their_number_and_by_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(num_scans: int, side: int = 64) -> None:
        data = hostile.refinement_scans(num_scans, side)
        check_decoding_cost(data, open_image_header(io.BytesIO(data)))
        assert decode_image(data).shape == (3, side, side)

    check(98)  # and two first scans
    with pytest.raises(DecodingLimitError, match="must have at most 100 scans"):
        check(99)
    monkeypatch.setattr(image_header, "MAX_SCANNED_PIXELS", 10 * 64 * 64)
    check(8)
    with pytest.raises(DecodingLimitError, match="at most 10 scans"):
        check(9)


def test_sequential_jpegs_with_separate_components_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    table = hostile.segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\x00")
    scans = [hostile.scan(0, 63, 0, bytes(17), component) for component in (1, 2, 3)] * 34
    data = hostile.jpeg(0xC0, [table, *scans], side=64, components=3)
    with pytest.raises(ImageError, match="at most 100 scans"):
        decode_image(data)


def test_decode_image_reads_ppm_with_other_maximum_values() -> None:
    values = np.arange(200 * 30).reshape(30, 200) % 1000
    data = b"P5 200 30 1000\n" + values.astype(">u2").tobytes()
    expected = np.round(values * (255 / 1000))
    assert np.abs(decode_image(data)[0].numpy() - expected).max() <= 1
    with pytest.raises(ImageError, match="unusual maximum value"):
        decode_image(b"P5 2000 2000 200\n" + bytes(4_000_000))


def test_scan_markers_in_metadata_and_behind_the_image_are_not_scans() -> None:
    """Thumbnails and the video behind a motion photo contain such bytes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8))
    data = encode(noise, "JPEG", progressive=True, quality=95)
    assert 1 < data.count(b"\xff\xda") < 20
    fake = hostile.segment(0xE1, b"Exif\0\0" + b"\xff\xda" * 1000)
    changed = data[:2] + fake + data[2:] + b"\xff\xda" * 1000
    assert torch.equal(decode_image(changed), decode_image(data))
    data_with_restarts = encode(noise, "JPEG", quality=98, restart_marker_blocks=1)
    assert b"\xff\x00" in data_with_restarts and b"\xff\xd3" in data_with_restarts
    for image, num_scans in ((data, data.count(b"\xff\xda")), (data_with_restarts, 1)):
        assert [marker for marker, _ in image_header._iter_jpeg_markers(image)].count(0xDA) == num_scans


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_whose_tags_share_bytes_takes_little_memory(kind: str) -> None:
    """2,000 tags refer to the same 100 kB."""
    tags = b"".join(struct.pack("<HHII", 1000 + number, 1, 100_000, 8) for number in range(2000))
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 100_008) + bytes(100_000) + struct.pack("<H", 2000) + tags + bytes(4)
    header = open_image_header(io.BytesIO(encode(Image.new("RGB", (8, 8)), kind, exif=exif)))
    with pytest.warns(UserWarning, match="Tag data larger than file"):
        values = header.getexif()
    assert sum(len(values[tag]) for tag in values) < 1_000_000


def test_requests_must_not_contain_avif() -> None:
    avif = encode(Image.new("RGB", (16, 16)), "AVIF")
    assert decode_image(avif).shape == (3, 16, 16)
    with pytest.raises(ImageError, match="AVIF images are not accepted"):
        load_request_image(avif, 1_000_000)
    assert load_query_image(avif, 1_000_000).shape == (3, 16, 16)  # an indexed file
    with pytest.raises(ImageTooLargeError, match="too many pixels: 16 x 16; the limit is 100"):
        load_query_image(avif, 100)
    assert load_request_image(png_bytes(), 1_000_000).shape == (3, 10, 12)


def test_file_size_is_limited_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "sparse.png"
    path.write_bytes(png_bytes())
    os.truncate(path, 1 << 40)
    for image in (path, str(path), FileImage(str(path))):
        with pytest.raises(ImageError, match="file too large"):
            load_image(image)
    file, log = write_jsonl(tmp_path / "x.jsonl", [{"image": "sparse.png", "caption": "a"}]), SkipLog(max_skipped=1.0)
    with pytest.raises(ValueError, match="no records"):
        list(open_records(file, log))
    assert log.skipped == {"unreadable image": 1}


# ---- tables and models ----------------------------------------------------------------------------------------------


@pytest.fixture
def parquet_batches(monkeypatch: pytest.MonkeyPatch) -> list[pa.RecordBatch]:
    """All batches that are read from Parquet files during the test."""
    batches: list[pa.RecordBatch] = []
    iter_batches = pq.ParquetFile.iter_batches

    def record_batches(*args: Any, **options: Any) -> Any:
        for batch in iter_batches(*args, **options):
            batches.append(batch)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", record_batches)
    return batches


def test_parquet_rows_that_share_an_image_are_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parquet_batches: list[pa.RecordBatch]
) -> None:
    """A file of a kilobyte in which 5,000 rows share one image of 100 kB."""
    path = tmp_path / "x.parquet"
    image = png_bytes() + bytes(100_000)
    table = pa.table({"image": [image] * 5000, "caption": ["a"] * 5000})
    pq.write_table(table, path, compression="zstd", row_group_size=5000)
    assert path.stat().st_size < 3000
    monkeypatch.setattr(table_cells, "MAX_BATCH_BYTES", 400_000)
    monkeypatch.setattr(table_cells, "MAX_WINDOW_BYTES", 400_000)
    monkeypatch.setattr(table_cells, "MAX_ROW_GROUP_BYTES", 1 << 20)
    assert load_image(ParquetImage(str(path), 3, "image")).shape == (3, 10, 12)
    with pytest.raises(ImageError, match="row group 0 take more than"):
        load_image(ParquetImage(str(path), 4999, "image"))
    sizes = [batch.nbytes for batch in parquet_batches]
    assert max(sizes) < 500_000 and sum(sizes) < 4 << 20
    parquet_batches.clear()
    next(open_records(path))
    assert max(batch.nbytes for batch in parquet_batches) < 500_000

    monkeypatch.setattr(table_cells, "MAX_ROW_GROUP_BYTES", 50_000)
    log = SkipLog(max_skipped=1.0)
    with pytest.raises(ValueError, match="no records"):
        list(open_records(path, log))
    assert log.skipped["unreadable file"] == 5000


def test_damaged_parquet_metadata_does_not_end_the_process(tmp_path: Path) -> None:
    """The fixture was found by the fuzz test. Reading the metadata of its columns aborts the process."""
    with pytest.raises(ValueError, match="no records"):
        list(open_records(FIXTURES / "damaged_statistics.parquet", SkipLog(max_skipped=1.0)))


def test_parquet_captions_are_read_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parquet_batches: list[pa.RecordBatch]
) -> None:
    """A file in which 1,000 rows share one caption of 100 kB."""
    captions = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"caption": captions}), tmp_path / "x.parquet", compression="zstd")
    monkeypatch.setattr(table_cells, "MAX_BATCH_BYTES", 400_000)
    assert len(list(open_records(tmp_path / "x.parquet"))) == 1000
    assert max(map(len, parquet_batches)) <= 4


def test_reading_parquet_cells_in_any_order_takes_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.parquet"
    images_in_rows = [png_bytes(width) + bytes(10_000) for width in range(1, 41)]
    pq.write_table(pa.table({"image.x": [b"other"] * 40, "image": images_in_rows}), path, row_group_size=20)
    monkeypatch.setattr(table_cells, "MAX_BATCH_BYTES", 1 << 18)  # a row at a time
    monkeypatch.setattr(table_cells, "MAX_WINDOW_BYTES", 50_000)
    monkeypatch.setattr(table_cells, "MAX_CACHE_BYTES", 120_000)
    monkeypatch.setattr(table_cells, "_windows", OrderedDict())
    for row in (0, 3, 25, 39, 38, 19, 7):
        assert ParquetImage(str(path), row, "image").read() == images_in_rows[row]
        windows = table_cells._windows.values()
        assert sum(window.cells.nbytes for window in windows) <= 120_000
        assert all(window.cells.nbytes <= 50_000 + 40_000 for window in windows)
    with pytest.raises(FileNotFoundError, match="no longer has row 20 in row group 1"):
        ParquetImage(str(path), 40, "image").read()
    monkeypatch.setattr(table_cells, "MAX_CELL_BYTES", 5000)
    with pytest.raises(OSError, match="the limit for a table cell"):
        ParquetImage(str(path), 3, "image").read()


def test_paths_in_table_cells_are_not_opened_later(tmp_path: Path) -> None:
    """The cells of an indexed table are overwritten with the path of a private file."""
    (tmp_path / "secret.png").write_bytes(png_bytes())
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = pa.array([{"bytes": png_bytes(), "path": None}] * 2, kind)
    pq.write_table(pa.table({"image": cells}), tmp_path / "x.parquet")
    image, _ = scan_source(Source(str(tmp_path / "x.parquet")), SkipLog())
    assert image.ref.read() == png_bytes()
    changed = pa.array([{"bytes": None, "path": str(tmp_path / "secret.png")}] * 2, kind)
    pq.write_table(pa.table({"image": changed}), tmp_path / "x.parquet")
    with pytest.raises(OSError, match="does not contain the bytes of an image"):
        image.ref.read()


def test_two_parquet_columns_with_the_same_name_are_not_read(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["caption", "caption"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(TooManySkippedError, match="several columns are named 'caption'"):
        list(open_records(tmp_path / "x.parquet"))


@pytest.mark.parametrize(("kind", "message"), [(4, "past the end"), (8, "past the end"), (99, "unknown")])
def test_gguf_arrays_must_fit_in_the_file(tmp_path: Path, kind: int, message: str) -> None:
    name = b"tokens"
    array = struct.pack("<IIQ", 9, kind, 1 << 40)
    header = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name + array
    (tmp_path / "x.gguf").write_bytes(header + bytes(40))
    with pytest.raises(ValueError, match=message):
        check_gguf_header(tmp_path / "x.gguf")


def test_timm_config_cannot_name_files_or_hub_models(tmp_path: Path) -> None:
    config = {"library": "timm", "architecture": "test_vit", "args": {"num_classes": 0}, "preprocess": {}}
    secret = {"checkpoint_path": str(tmp_path / "other.safetensors"), "cache_dir": str(tmp_path), "pretrained": True}
    model = build_backbone({**config, "args": {"num_classes": 0, **secret}})
    assert type(model) is type(build_backbone(config))
    for name in ("hf-hub:owner/name", f"local-dir:{tmp_path}", "no_such_model"):
        with pytest.raises(ValueError, match="has no architecture"):
            build_backbone({**config, "architecture": name})


@pytest.mark.parametrize(
    ("file", "name"),
    [("config.json", "AutoModel"), ("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")],
)
def test_code_in_an_llm_folder_does_not_run(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    folder, marker = shutil.copytree(llm, tmp_path / "llm"), tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    code = ["evil.Evil", None] if name == "AutoTokenizer" else "evil.Evil"
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, "auto_map": {name: code}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(ValueError):
        CaptionEncoder.from_pretrained(folder)
    assert not marker.exists()


KERNEL_KEYS = ("attn_implementation", "_attn_implementation")
KERNELS = ("evil/kernel", "kernels-community/flash-attn2@v1:f", "flash_attention_2")


@pytest.fixture
def kernel_requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attention implementations for which transformers looks outside of its own code."""
    requests: list[str] = []
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda name, **_: requests.append(name)
    )
    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel._supports_flash_attn", True, raising=False)
    return requests


@pytest.mark.parametrize("key", KERNEL_KEYS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_tower_config_cannot_name_kernels(key: str, kernel: str, kernel_requests: list[str]) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    architecture = {"model_type": "clip_vision_model", **sizes, "image_size": 16, "patch_size": 8}
    auto_map = {"AutoModel": "modeling_evil.Evil"}
    model: Any = build_backbone(
        {"library": "transformers", "architecture": {**architecture, key: kernel, "auto_map": auto_map}}
    )
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not kernel_requests and not hasattr(model.config, "auto_map")
    with pytest.raises(ValueError, match="unsupported model type 'timm_wrapper'"):
        build_backbone({"library": "transformers", "architecture": {"model_type": "timm_wrapper"}})


@pytest.mark.parametrize("layout", ["transformers", "sentence-transformers", "arguments"])
def test_encoder_config_cannot_name_kernels(
    layout: str, llm: Path, encoder: CaptionEncoder, tmp_path: Path, kernel_requests: list[str]
) -> None:
    """A folder of sentence-transformers can also contain arguments of `from_pretrained`."""
    if layout == "transformers":
        shutil.copytree(llm, tmp_path, dirs_exist_ok=True)
    else:
        encoder.save_pretrained(tmp_path)
    file = tmp_path / ("sentence_bert_config.json" if layout == "arguments" else "config.json")
    config = json.loads(file.read_text())
    for key in KERNEL_KEYS:
        for kernel in KERNELS:
            arguments = {"model_kwargs": {key: kernel, "allow_all_kernels": True}, "config_kwargs": {key: kernel}}
            file.write_text(json.dumps({**config, **(arguments if layout == "arguments" else {key: kernel})}))
            if layout == "arguments" and key == "_attn_implementation":
                continue  # not an argument
            loaded = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
            assert loaded.attention == encoder.attention
    assert not kernel_requests


def test_quantized_encoders_are_rejected(llm: Path, tmp_path: Path) -> None:
    """Without its quantisation method, the weights would be loaded without their scale."""
    shutil.copytree(llm, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"has quantised weights .* Use the model's original weights"):
        CaptionEncoder.from_pretrained(tmp_path, device="cpu")


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 0), ("hidden_size", "64"), ("model_type", ["x"])])
def test_malformed_model_configs_are_errors_with_the_folder(name: str, value: Any, llm: Path, tmp_path: Path) -> None:
    shutil.copytree(llm, tmp_path / "llm")
    (tmp_path / "tower").mkdir()
    tower_config = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    llm_config = json.loads((llm / "config.json").read_text())
    loaders: dict[str, tuple[Any, dict[str, Any]]] = {
        "tower": (VisionTower.from_pretrained, tower_config),
        "llm": (CaptionEncoder.from_pretrained, llm_config),
    }
    for folder, (load, config) in loaders.items():
        (tmp_path / folder / "config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises(ValueError, match=rf"(?s){folder} cannot be loaded \(.*Check its config.json"):
            load(tmp_path / folder)


@pytest.mark.parametrize(
    ("pattern", "content", "depth", "is_accepted"),
    [
        ({"String": " "}, "\u2581", 50, True),
        ({"Regex": r"\s+"}, " ", 9, True),
        ({"String": "a"}, "a" * 100, 2, False),
        ({"Regex": "x*"}, "a", 10, False),
    ],
)
def test_tokenizers_that_make_texts_too_long_are_rejected(
    pattern: dict[str, str], content: str, depth: int, is_accepted: bool, llm: Path, tmp_path: Path
) -> None:
    """The tokenizers library would abort the process."""
    shutil.copytree(llm, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer.json"
    replace = {"type": "Replace", "pattern": pattern, "content": content}
    nested = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Sequence", "normalizers": [replace] * depth}],
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": nested}))
    with nullcontext() if is_accepted else pytest.raises(ValueError, match="normalizer can lengthen texts"):
        CaptionEncoder.from_pretrained(tmp_path, device="cpu")


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.csv", "x.tsv", "captions.txt", "x.json"])
def test_sparse_caption_files_are_rejected_before_they_fill_the_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / name
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 1 << 16)
    monkeypatch.setattr(text_files, "MAX_SKIPPED_CHARACTERS", 1 << 20)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(bytes(10 << 20)))
    else:
        path.write_text("id,caption\n1,")
        os.truncate(path, 1 << 40)
    with pytest.raises(DataFormatError, match=r"a line has more than|is too large"):
        list(open_records(path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", '{{"id": "1", "caption": "a"}}\n{long}\n{{"id": "2", "caption": "b"}}\n'),
        ("x.csv", "id,caption\n1,a\n2,{long}\n2,b\n"),
        ("x.csv", 'id,caption\n1,a\n2,"{short}\n{short}\n{short}"\n2,b\n'),
        ("captions.txt", "1.jpg,a\n1.jpg,{long}\n2.jpg,b\n"),
    ],
)
def test_a_row_that_is_too_long_is_skipped(
    name: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 10_000)
    (tmp_path / name).write_text(content.format(long="x" * 2_000_000, short="x" * 4000))
    log = SkipLog(max_skipped=1.0)
    assert [record.captions for record in open_records(tmp_path / name, log, "unchecked")] == [("a",), ("b",)]
    assert "a row has more than 10,000 characters" in log.examples[0]


@pytest.mark.parametrize("name", ["a.json", "a.txt"])
def test_caption_files_next_to_images_are_limited(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_bytes())
    (tmp_path / name).write_text("[")
    os.truncate(tmp_path / name, 1 << 40)
    with pytest.raises(TooManySkippedError, match="caption file over 1 MB"):
        list(open_records(tmp_path))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_tar_headers_are_limited(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 1 << 33
    (tmp_path / "x.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "x.tar", 1 << 40)
    with pytest.raises(TooManySkippedError, match="headers of a member are larger than 65,536 bytes"):
        list(open_records(tmp_path / "x.tar"))


def test_captions_of_a_row_are_limited(tmp_path: Path) -> None:
    rows = [{"caption": "a" * (1 << 20)}, {"caption": ["a" * (1 << 19), "b" * (1 << 19), "c"]}]
    log = SkipLog(max_skipped=1.0)
    assert len(list(open_records(write_jsonl(tmp_path / "x.jsonl", rows), log))) == 1
    assert "more than 1,048,576 characters" in log.examples[0]


@pytest.mark.parametrize(
    "cell", ["[f'{1}{1}']", "['a', rf'{1}']", "[{1,{2}}]", "[{[]: 1}]", "['a', ...]", "[b'a']", "[-'a']", "['a'] * 9"]
)
def test_only_lists_of_strings_are_parsed_as_python(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records.ast, "literal_eval", lambda _: pytest.fail("the cell was parsed"))
    assert records.parse_captions(cell, True, SkipLog(), "x.csv", 1) == (cell,)


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['the chef\\'s hat', \"a dog's\", None, u'x',]", ("the chef's hat", "a dog's", "x")),
        (" [ 'of', \"if 'f'\" ] ", ("of", "if 'f'")),
        ('["a", "b\\n"]', ("a", "b")),
        ("['open", ("['open",)),
    ],
)
def test_lists_in_cells_are_parsed(cell: str, captions: tuple[str, ...]) -> None:
    assert records.parse_captions(cell, True, SkipLog(), "x.csv", 1) == captions


def test_coco_ids_of_a_wrong_type_are_skipped(tmp_path: Path) -> None:
    data = {
        "images": [{"id": 1, "file_name": "a.png"}, *({"id": value, "file_name": "a.png"} for value in ([], None))],
        "annotations": [{"image_id": 1, "caption": "x"}, {"image_id": {}, "caption": "y"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(data))
    log = SkipLog(max_skipped=1.0)
    assert [record.captions for record in open_records(tmp_path / "x.json", log, "unchecked")] == [("x",)]
    assert log.skipped == {"malformed row": 3}


def test_an_unexpected_exception_of_a_reader_is_a_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        yield "x.jsonl", 1, {"caption": "a"}
        raise MemoryError("no memory")

    file, log = write_jsonl(tmp_path / "x.jsonl", [{"caption": "a"}]), SkipLog(max_skipped=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(text_files.JsonLinesFormat, "read", fail)
        assert [record.captions for record in open_records(file, log)] == [("a",)]
    assert log.examples == [f"{file}, row 2: unreadable file: MemoryError: no memory"]
    monkeypatch.setattr(records, "_parse_name_cell", lambda *_: {}["missing"])
    with pytest.raises(TooManySkippedError, match="malformed row: KeyError: "):
        list(open_records(file))


# ---- names of files -------------------------------------------------------------------------------------------------


def scan(source: Path | str, allow_outside: bool = False) -> tuple[list[IndexedImage], SkipLog]:
    log = SkipLog(max_skipped=1.0)
    return list(scan_source(Source(str(source)), log, allow_outside=allow_outside)), log


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder `set` with one image, next to a folder with a private image."""
    for name in ("set/a.png", "private/secret.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png_bytes())
    return tmp_path / "set"


def test_index_skips_images_outside_the_source(folders: Path) -> None:
    secret = folders.parent / "private" / "secret.png"
    (folders / "link.png").symlink_to(secret)
    (folders / "sub").symlink_to(secret.parent)
    names = ["a.png", str(secret), "../private/secret.png", "link.png", "sub/secret.png", "../set/a.png"]
    file = write_jsonl(folders / "captions.jsonl", [{"image": name, "caption": "x"} for name in names])
    for source in (file, folders / "*.jsonl", folders):
        found, log = scan(source)
        assert {image.name for image in found} == {str(folders / "a.png")}
        assert log.skipped["the image is outside the source's folder; see --allow_outside"] >= 1
    found, log = scan(file, allow_outside=True)
    assert len(found) == len(names) and not log.skipped
    assert len(list(open_records(file))) == len(names)  # training may use images in other folders


def test_index_finds_the_images_of_coco_next_to_the_annotations(folders: Path) -> None:
    (folders / "annotations").mkdir()
    file = folders / "annotations" / "captions_val.json"
    images_of_coco = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "../private/secret.png"}]
    annotations = [{"image_id": number, "caption": "x"} for number in (1, 2)]
    file.write_text(json.dumps({"images": images_of_coco, "annotations": annotations}))
    found, log = scan(file)
    assert [image.name for image in found] == [str(folders / "a.png")]
    assert log.skipped["the image is outside the source's folder; see --allow_outside"] == 1


def test_devices_and_named_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    os.mkfifo(tmp_path / "x.png")
    for source in (tmp_path / "x.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(ValueError, match="not a regular file"):
            open_records(source)
    for path in (tmp_path / "x.png", "/dev/zero"):
        with pytest.raises(ImageError, match="not a regular file"):
            load_image(path)


def test_print_once_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_once("photo\x1b]0;title\x07.jpg\r", "ü\t\x9b2J")
    assert capsys.readouterr().out == "photo\\x1b]0;title\\x07.jpg\\x0d\nü\t\\x9b2J\n"


def test_temporary_names_cannot_be_guessed(tmp_path: Path) -> None:
    """Otherwise, another user could prepare a link with this name in a shared folder."""
    for atomic in (atomic_path, atomic_dir):
        names = set()
        for number in range(10):
            with atomic(tmp_path / f"{atomic.__name__}{number}") as temporary:
                if atomic is atomic_path:
                    temporary.write_text("x")
                names.add(temporary.name.split(".")[2])
        assert len(names) == 10 and all(len(name) == 16 for name in names)


def test_push_rejects_paths_in_the_home_folder(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    file = tmp_path / "text" / "adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": "owner/llm"}))
    _check_for_home_paths(tmp_path)
    file.write_text(json.dumps({"base_model_name_or_path": str(Path.home() / "models" / "llm")}))
    with pytest.raises(ValueError, match=r"adapter_config\.json contains a path"):
        _check_for_home_paths(tmp_path)
