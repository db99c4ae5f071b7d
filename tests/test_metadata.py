"""Metadata of images: EXIF data, filters, details, API and galleries, all derived from the same declarations."""

import io
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

import search_fixtures
from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.io_utils import to_valid_unicode
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import gallery
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import (
    CONDITIONS,
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    MAX_CAMERA_LENGTH,
    MAX_FILTER_LENGTH,
    TIME_OFFSET,
    Filter,
    convert_metadata_to_json,
    read_exif,
)
from llm2clip.search.schemas import FilterRequest, HitResponse, ImageLocation
from llm2clip.search.types import IndexedContent, IndexedImage
from search_fixtures import index_sources, search_names

PARIS = {1: "N", 2: (48.0, 51.0, 29.6), 3: "E", 4: (2.0, 17.0, 40.2)}
MAP = "https://www.openstreetmap.org/?mlat=-33.5&mlon=-70.25#map=15/-33.5/-70.25"


def encode_image(camera: tuple[str, str] = ("", ""), date: str = "", gps: dict[int, Any] | None = None) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x010F], exif[0x0110] = camera
    if date:
        exif.get_ifd(0x8769)[0x9003] = date
    if gps:
        exif.get_ifd(0x8825).update(gps)
    Image.new("RGB", (8, 8)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ({"camera": ("Canon", "Canon EOS R5")}, {"camera": "Canon EOS R5"}),
        ({"camera": ("SONY", "ILCE-7")}, {"camera": "SONY ILCE-7"}),
        ({"camera": ("x", "y" * 500)}, {"camera": f"x {'y' * 500}"[:MAX_CAMERA_LENGTH]}),
        ({"date": "2002:03:04 05:06:07"}, {"taken": datetime(2002, 3, 4, 5, 6, 7).timestamp()}),
        ({"date": "0000:00:00 00:00:00"}, {}),
        ({"date": "1970:01:02 00:00:00", "modified": datetime(1970, 1, 2).timestamp()}, {"taken": "offset"}),
        ({"gps": PARIS}, {"latitude": 48.858222, "longitude": 2.2945}),
        ({"gps": {**PARIS, 1: "S", 3: "W"}}, {"latitude": -48.858222, "longitude": -2.2945}),
        ({"gps": {**PARIS, 2: (91.0, 0.0, 0.0)}}, {}),
        ({"gps": {**PARIS, 4: (IFDRational(0, 0), 0.0, 0.0)}}, {}),
        ({"gps": {1: "N", 2: (48.0, 51.0, 29.6)}}, {}),
    ],
)
def test_read_exif(image: dict[str, Any], expected: dict[str, Any]) -> None:
    modified = image.pop("modified", 1.5)
    if expected.get("taken") == "offset":  # so that an EXIF time always differs from the modification time
        expected = {"taken": modified + TIME_OFFSET}
    assert read_exif(encode_image(**image), modified) == {"taken": modified, "camera": "", **expected}
    assert read_exif(b"no image", modified) == {"taken": modified}


def add_images(backend: IndexBackend) -> None:
    """Add images with different cameras, positions and sizes."""
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": 8})
    rows = [("Canon EOS R5", -33.5, 100), ("NIKON D5_\0", None, 200), ("", 10.0, 300), ("Leica ÄQ2 100%", None, 400)]
    for number, (camera, latitude, side) in enumerate(rows):
        image = IndexedImage(
            f"/p/{number}.jpg",
            FileImage(f"/p/{number}.jpg"),
            "/p",
            "1",
            taken=100.0 * number,
            camera=camera,
            latitude=latitude,
            longitude=None if latitude is None else -70.25,
        )
        content = IndexedContent(bytes([number]), np.eye(8, dtype=np.float16)[number], b"jpeg", width=side, height=500)
        backend.add_images([content], [(image, content.hash)])


@pytest.mark.parametrize("kind", search_fixtures.BACKENDS)
def test_metadata_is_stored_filtered_and_shown(kind: str, tmp_path: Path) -> None:
    backend = search_fixtures.create_backend(kind, tmp_path / "index")
    add_images(backend)
    for conditions, expected in (
        ({"camera": "canon"}, {"0.jpg"}),
        ({"camera": "äq"}, {"3.jpg"}),
        ({"camera": "_"}, {"1.jpg"}),
        ({"camera": "%"}, {"3.jpg"}),
        ({"camera": "\0"}, {"1.jpg"}),
        ({"camera": "o", "before": 50.0}, {"0.jpg"}),
        ({"camera": "o", "min_side": 150}, {"1.jpg"}),
        ({"camera": ""}, {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}),
        ({"after": 100.0, "before": 200.0}, {"1.jpg", "2.jpg"}),
        ({"min_side": 300}, {"2.jpg", "3.jpg"}),
    ):
        assert search_names(backend, Filter(**conditions)) == expected, conditions
        assert backend.count_matches(Filter(**conditions)) == len(expected)
    hits = {Path(hit.images[0].name).stem: hit for hit in backend.search(None, 9, Filter())}
    assert [hits[name].images[0].camera for name in "0123"] == ["Canon EOS R5", "NIKON D5_\0", "", "Leica ÄQ2 100%"]
    size, date, camera, position = hits["0"].details
    assert (size.text, camera.text, camera.url) == ("100 × 500", "Canon EOS R5", "")
    assert date.text == f"{datetime.fromtimestamp(0):%Y-%m-%d %H:%M}"
    assert (position.text, position.url) == ("-33.5, -70.25", MAP)
    assert len(hits["1"].details) == 3 and len(hits["2"].details) == 3

    for with_private in (False, True):
        folder = tmp_path / str(with_private)
        folder.mkdir()
        [details] = [
            item[2] for item in gallery._write_gallery_images(backend, folder, with_private) if item[0] == "0.jpg"
        ]
        assert (["-33.5, -70.25", MAP] in details) is with_private and ["Canon EOS R5", ""] in details


def test_times_out_of_range_are_not_shown() -> None:
    image = IndexedImage("/a", FileImage("/a"), "/", "1", taken=1e18)
    assert convert_metadata_to_json(image, IMAGE_FIELDS)["taken"] is None


def test_api_has_all_declared_fields_and_filters() -> None:
    assert set(FilterRequest.model_fields) == set(CONDITIONS)
    assert {item.name for item in IMAGE_FIELDS} < set(ImageLocation.model_fields)
    assert {item.name for item in CONTENT_FIELDS} < set(HitResponse.model_fields)
    request = FilterRequest.model_validate({"camera": "canon", "after": 1.5, "min_side": 3})
    assert request.to_filter() == Filter(camera="canon", after=1.5, min_side=3)


def test_filter_rejects_unknown_names_and_long_texts() -> None:
    assert not Filter(path=None) and Filter(path="")
    with pytest.raises(TypeError, match="unknown filter 'lens'; valid filters are caption, path, after"):
        Filter(lens="x")
    for name in ("caption", "camera"):
        Filter(**{name: "a" * MAX_FILTER_LENGTH})
        with pytest.raises(ValueError, match=f"the {name} filter is too long: 501 characters; the limit is 500"):
            Filter(**{name: "a" * 501})


def test_index_contains_the_metadata_of_the_files(dual_encoder: DualEncoder, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(encode_image(("Canon", "EOS"), "2002:03:04 05:06:07", PARIS))
    backend = search_fixtures.create_backend("sqlite", tmp_path / "index")
    index_sources([photos], dual_encoder, backend)
    [hit] = backend.search(None, 9, Filter(camera="canon eos"))
    assert [detail.text for detail in hit.details] == ["8 × 8", "2002-03-04 05:06", "Canon EOS", "48.858222, 2.2945"]


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        (FileImage("/photos/Hello!World.jpg"), "Hello!World.jpg"),
        (TarImage("/photos/a.tar", 512, 9, "dir/b.png"), "b.png"),
        (TarImage("/photos/a.tar", 512, 9, "b.png"), "b.png"),
        (TarImage("/photos/a.tar", 512, 9, "dir/Hello!World.jpg"), "Hello!World.jpg"),
        (ParquetImage("/photos/t.parquet", 7, "image"), "t.parquet[7].image"),
        (FileImage("/photos/café\udcff.png"), "café\\udcff.png"),
    ],
)
def test_file_names_do_not_contain_folders(ref: ImageRef, expected: str) -> None:
    for suffix in ("", "@512") if isinstance(ref, TarImage) else ("",):
        image = IndexedImage(to_valid_unicode(ref.canonical_path) + suffix, ref, "/photos", "1")
        assert image.file_name == expected
