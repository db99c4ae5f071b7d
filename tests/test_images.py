"""Image decoding, and transforms compared with those of timm and transformers."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from conftest import HANG_TIMEOUT, redirect_errors, run_in_process, start_fork_server
from format_fixtures import encode
from llm2clip.data import image_header, images, transforms
from llm2clip.data.image_refs import FileImage, InMemoryImage
from llm2clip.data.images import ImageError, decode_image, decode_or_return_error, iter_image_batches, load_image
from llm2clip.data.transforms import MIN_CROP_SCALE, EvalTransform, PreprocessConfig, TrainTransform
from llm2clip.search.images import load_request_image

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def photo(width: int = 120, height: int = 160) -> Image.Image:
    """An image with smooth areas, edges and noise, which compresses and resizes like a photograph."""
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse).astype(int) + rng.integers(-6, 7, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 30)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decode_with_pil(data: bytes) -> Tensor:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def max_difference(a: Tensor, b: Tensor) -> int:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == torch.uint8
    return int((a.int() - b.int()).abs().max())


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("JPEG", mode, {"quality": 92, "progressive": p}) for mode in ("RGB", "L", "CMYK") for p in (False, True)]
    + [(kind, mode, {}) for kind in ("PNG", "GIF", "BMP", "TIFF") for mode in ("RGB", "L", "1", "P")]
    + [("WEBP", "RGB", {"lossless": True}), ("PPM", "RGB", {}), ("PPM", "L", {}), ("TIFF", "CMYK", {})],
)
def test_decode_image_equals_pil(kind: str, mode: str, options: dict[str, Any]) -> None:
    data = encode(photo().convert(mode), kind, **options)
    assert max_difference(decode_image(data), decode_with_pil(data)) <= (kind == "JPEG")


def test_torchvision_and_pillow_decode_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = photo().convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    files = [
        encode(photo(), "JPEG"),
        encode(alpha, "WEBP", lossless=True),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode_with_torchvision", lambda *_: None)
        expected_pixels = [decode_image(data) for data in files]

    def fail(*_: object) -> Tensor:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(images, "_decode_with_pillow", fail)
    for data, expected in zip(files, expected_pixels, strict=True):
        assert max_difference(decode_image(data), expected) <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_decode_image_applies_exif_orientation(kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encode(photo(), kind, exif=exif, **options)
        pixels = decode_image(data)
        assert pixels.shape == ((3, 160, 120) if orientation < 5 else (3, 120, 160))
        assert max_difference(pixels, decode_with_pil(data)) <= 1, orientation
        assert max_difference(load_image(Image.open(io.BytesIO(data))), pixels) <= 1


def test_decode_image_blends_alpha_with_white() -> None:
    image = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    image.putpixel((2, 0), (200, 100, 0, 128))
    for data in (encode(image, "PNG"), encode(image, "WEBP", lossless=True, exact=True), encode(image, "TIFF")):
        pixels = decode_image(data)
        assert pixels[:, 0, 0].tolist() == [255, 255, 255]
        assert pixels[:, 0, 1].tolist() == [200, 0, 0]
        assert pixels[:, 0, 2].tolist() == [227, 177, 127]
    grey = decode_image(encode(image.convert("LA"), "PNG"))
    assert grey[:, 0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([9, 9, 9, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode_image(encode(palette, kind, transparency=0))
        assert pixels[:, 0].T.tolist() == [[255, 255, 255], [40, 50, 60]]


def test_decode_image_scales_16_bit_pixels() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        assert decode_image(encode(Image.fromarray(values), kind))[0].tolist() == [[0, 1, 128, 255]]
    assert load_image(Image.fromarray(values.astype(np.int32)))[2].tolist() == [[0, 1, 128, 255]]
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.fromarray(values.astype(np.float32)))


def test_decode_image_returns_the_first_frame() -> None:
    frames = {"save_all": True, "append_images": [photo().rotate(180)]}
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        data = encode(photo(), kind, **frames, **options)
        assert max_difference(decode_image(data), decode_with_pil(data)) == 0


@pytest.mark.parametrize(
    ("kind", "load_truncated"),
    [(kind, False) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")] + [("JPEG", True), ("PNG", True)],
)
def test_decode_image_rejects_truncated_files(kind: str, load_truncated: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", load_truncated)
    data = encode(photo(), kind)
    for fraction in (0.05, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode_image(data[: int(len(data) * fraction)])
    if kind == "JPEG":
        for jpeg in (data, encode(photo(), "JPEG", progressive=True)):
            with pytest.raises(ImageError, match="truncated"):
                decode_image(jpeg[:-100])


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_decode_image_rejects_huge_images_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_decode_with_torchvision", lambda *_: pytest.fail("pixels were decoded"))
    monkeypatch.setattr(images, "_decode_with_pillow", lambda *_: pytest.fail("pixels were decoded"))
    for side in (10_001, 100_000):  # the second exceeds Pillow's own limit
        with pytest.raises(ImageError, match="pixels"), pytest.warns() if side < 13_000 else contextlib.nullcontext():
            decode_image(png_header(side, side))


# ---- loading --------------------------------------------------------------------------------------------------------


def test_load_image_accepts_every_input_type(tmp_path: Path) -> None:
    data = encode(photo(), "PNG")
    path = tmp_path / "an image.png"
    path.write_bytes(data)
    expected = decode_image(data)
    with path.open("rb") as file:
        for image in (str(path), path, data, io.BytesIO(data), file, photo(), Image.open(path), expected):
            assert torch.equal(load_image(image), expected)


def test_load_image_accepts_arrays_and_float_tensors() -> None:
    array = np.asarray(photo(20, 16))
    expected = torch.from_numpy(array.copy()).permute(2, 0, 1)
    assert torch.equal(load_image(array), expected)
    assert torch.equal(load_image(array[:, ::-1]), expected.flip(2))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert (load_image((expected / 255).to(dtype)).int() - expected.int()).abs().max() <= (dtype == torch.bfloat16)
    grey = load_image(array[..., 0])
    assert grey.shape == (3, 16, 20) and torch.equal(grey[2], expected[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.rand(3, 4, 4) * 255, r"between 0 and 1, before any normalisation \(got .* to .*\)"),
        (torch.full((3, 4, 4), math.nan), "between 0 and 1"),
        (torch.zeros(4, 4, 3), r"shape \(3, H, W\) and dtype uint8 or float \(got torch.float32 \(4, 4, 3\)\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "uint8 or float"),
        (torch.zeros(3, 0, 4), "uint8 or float"),
        (np.zeros((3, 4, 4), np.uint8), r"\(H, W, 3\) or \(H, W\) and dtype uint8 \(got uint8 \(3, 4, 4\)\)"),
        (np.zeros((4, 4, 3)), "got float64"),
    ],
)
def test_load_image_rejects_arrays_of_other_types_and_shapes(image: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(image)


def test_load_image_names_the_file_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    with pytest.raises(ImageError, match=r"broken\.jpg: No such file"):
        load_image(path)
    data = encode(photo(), "JPEG")
    path.write_bytes(data[: len(data) // 2])
    for image in (path, str(path), path.open("rb"), Image.open(path)):
        with pytest.raises(ImageError, match=r"broken\.jpg: .*truncated"):
            load_image(image)
    for wrong in (3, None, torch.zeros(4, 4, dtype=torch.uint8)):
        with pytest.raises(ImageError):
            load_image(wrong)  # type: ignore[arg-type]


# ---- preprocessing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (224, 224 / 256), (260, 0.95), (384, 1.0)])
def test_preprocess_round_trips_and_transformers_reads_it(
    resize: Any, size: int, crop_pct: float, tmp_path: Path
) -> None:
    from transformers import CLIPImageProcessor

    preprocess = PreprocessConfig(size, resize, crop_pct, "bilinear", *HALF)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess.to_dict()))
    assert PreprocessConfig.from_dict(json.loads((tmp_path / "preprocessor_config.json").read_text())) == preprocess

    processor = CLIPImageProcessor.from_pretrained(tmp_path)
    # A square image, because transformers rounds the corner of a centre crop down.
    expected = torch.as_tensor(processor(photo(301, 301), return_tensors="pt")["pixel_values"][0])
    gap = ((EvalTransform(preprocess)(load_image(photo(301, 301))) / 255 - 0.5) / 0.5 - expected).abs()
    assert gap.mean() < 5e-3
    assert gap.max() < 2.01 / 255 / 0.5


def test_preprocess_reads_transformers_processors() -> None:
    old = {"size": 224, "crop_size": 224, "do_center_crop": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    assert PreprocessConfig.from_dict(old) == PreprocessConfig(
        224, "shortest", 1.0, "bicubic", (0.1, 0.2, 0.3), (1, 1, 1), crop_rounding="down"
    )
    dino = {**old, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    assert PreprocessConfig.from_dict(dino).resize_size == 256
    siglip = {**old, "size": {"height": 384, "width": 384}, "do_center_crop": None, "resample": 2}
    preprocess = PreprocessConfig.from_dict(siglip)
    assert (preprocess.size, preprocess.resize, preprocess.resize_size) == (384, "squash", 384)
    assert preprocess.interpolation == "bilinear"
    for bad in ({"height": 224, "width": 196}, {"longest_edge": 512}, None):
        with pytest.raises(ValueError, match="must be square"):
            PreprocessConfig.from_dict({**siglip, "size": bad, "crop_size": None})


@pytest.mark.parametrize("shape", [(500, 375), (200, 150), (224, 224), (901, 307)])
@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_eval_transform_equals_timm(shape: tuple[int, int], crop_mode: str, interpolation: Any) -> None:
    from timm.data import create_transform

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    timm_transform = create_transform(
        (3, 224, 224), crop_pct=0.9, crop_mode=crop_mode, interpolation=interpolation, mean=mean, std=std
    )
    transform = EvalTransform(
        PreprocessConfig(224, "squash" if crop_mode == "squash" else "shortest", 0.9, interpolation, mean, std)
    )
    pixels = transform(load_image(photo(*shape)))
    assert pixels.dtype == torch.uint8
    normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    gap = (normalised - timm_transform(photo(*shape))).abs()
    # Rounding differs for some pixels: on average 5e-5, at most 4e-3. A crop one pixel off would give 4e-2.
    assert gap.mean() < 5e-3
    assert gap.max() < 2.01 / 255 / min(std)


def test_centre_crop_has_the_corner_of_torchvision_or_of_transformers() -> None:
    from torchvision.transforms.v2 import CenterCrop
    from transformers import CLIPImageProcessor

    size = 16
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size=size, do_rescale=False, do_normalize=False, do_resize=False
    )
    like_transformers = EvalTransform(PreprocessConfig.from_dict(processor.to_dict() | {"do_resize": True}))
    like_torchvision = EvalTransform(PreprocessConfig(size, "shortest", 1.0, "bicubic", *HALF))
    for long in range(size, size + 40):
        row = torch.arange(long, dtype=torch.uint8)  # the value of a pixel is its column
        for image in (row.expand(3, size, long), row.expand(3, size, long).transpose(1, 2)):
            expected = processor(image, return_tensors="pt")["pixel_values"][0]
            assert torch.equal(like_transformers(image), expected)
            assert torch.equal(like_torchvision(image), CenterCrop(size)(image))


@pytest.mark.parametrize("shape", [(500, 375), (333, 500), (200, 150), (427, 640), (227, 224)])
@pytest.mark.parametrize("size", [224, 336])
def test_eval_transform_equals_transformers_on_pil(shape: tuple[int, int], size: int) -> None:
    import transformers

    # In older versions the processor that uses Pillow has the plain name.
    processor_class = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor = processor_class(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    preprocess = PreprocessConfig.from_dict(processor.to_dict())
    statistics = preprocess.mean, preprocess.std
    assert preprocess == PreprocessConfig(size, "shortest", 1.0, "bicubic", *statistics, crop_rounding="down")
    expected = torch.as_tensor(processor(photo(*shape), return_tensors="pt")["pixel_values"][0])
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
    gap = ((EvalTransform(preprocess)(load_image(photo(*shape))) / 255 - mean) / std - expected).abs()
    assert gap.mean() < 5e-3
    assert gap.max() < 2.01 / 255 / min(preprocess.std)


def test_transforms_of_very_elongated_images_use_little_memory() -> None:
    preprocess = PreprocessConfig(64, "shortest", 1.0, "bicubic", *HALF)
    strip = torch.zeros(3, 1, 3_000_000, dtype=torch.uint8)
    strip[:, :, 1_499_000:1_501_000] = 200
    for image in (strip, strip.transpose(1, 2)):
        assert (EvalTransform(preprocess)(image) == 200).all()
        assert TrainTransform(preprocess)(image, torch.Generator().manual_seed(0)).shape == (3, 64, 64)


def test_train_transform_depends_only_on_its_generator() -> None:
    transform = pickle.loads(pickle.dumps(TrainTransform(PreprocessConfig(64, "shortest", 1.0, "bicubic", *HALF))))
    image = load_image(photo(150, 150))
    first, second, again = (transform(image, torch.Generator().manual_seed(seed)) for seed in (1, 2, 1))
    assert first.shape == (3, 64, 64) and first.dtype == torch.uint8
    assert torch.equal(again, first) and not torch.equal(second, first)


def test_train_transform_crops_have_the_documented_size_and_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = [transforms._sample_crop_box(300, 300, generator) for _ in range(300)]
    for top, left, height, width in boxes:
        assert 0 <= top <= 300 - height and 0 <= left <= 300 - width
        assert MIN_CROP_SCALE - 0.01 < height * width / 300**2 <= 1
        assert 0.74 < width / height < 1.35
    assert {math.copysign(1, width - height) for _, _, height, width in boxes} == {1.0, -1.0}


def test_image_batches_are_equal_with_workers_and_report_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [FileImage(str(tmp_path / f"{n}.jpg")) for n in range(7)]
    transform = EvalTransform(PreprocessConfig(32, "squash", 1.0, "bicubic", *HALF))
    for n, ref in enumerate(refs):
        Path(ref.path).write_bytes(encode(photo(60 + n), "JPEG")[: 200 if n in (1, 6) else None])
    batches = list(iter_image_batches(refs, transform, 3))
    monkeypatch.setattr(images, "MIN_IMAGES_FOR_WORKERS", 7)
    batches_of_workers = list(iter_image_batches(refs, transform, 3, workers=2))
    for (indices, pixels, failures), of_workers in zip(batches, batches_of_workers, strict=True):
        assert (indices, failures) == (of_workers[0], of_workers[2])
        assert all(torch.equal(a, b) for a, b in zip(pixels, of_workers[1], strict=True))
    assert [indices for indices, _, _ in batches] == [[0, 2], [3, 4, 5], []]
    assert [list(failures) for _, _, failures in batches] == [[1], [], [6]]
    assert torch.equal(batches[0][1][1], transform(load_image(refs[2])))


def test_packed_batches_contain_a_single_tensor_and_restore_any_structure() -> None:
    items = [
        ("a", {"pixels": torch.arange(5, dtype=torch.uint8), "mask": torch.tensor([True, False])}, b"thumbnail"),
        ("b", {"pixels": torch.rand(2, 3).T, "scalar": torch.tensor(7)}, None),
        ("c", torch.empty(0, 4, dtype=torch.bfloat16), "error message"),
    ]
    packed = images.pack_batch(items)
    assert packed.dtype == torch.uint8 and b"torch.storage" not in packed.numpy().tobytes()
    restored = images.unpack_batch(packed)
    assert [(name, other) for name, _, other in restored] == [(name, other) for name, _, other in items]
    for (_, value, _), (_, expected, _) in zip(restored, items, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


def test_closing_image_batches_early_stops_the_workers_cleanly(tmp_path: Path) -> None:
    """A worker would be aborted if a thread were still sending a batch when the interpreter is finalized."""
    exit_code = run_in_process(_close_image_batches_early, tmp_path / "errors")
    assert (tmp_path / "errors").read_text() == ""
    assert exit_code == 0


def _close_image_batches_early(errors: Path) -> None:
    redirect_errors(errors)
    images.MIN_IMAGES_FOR_WORKERS = 0
    refs = [InMemoryImage(encode(photo(), "PNG"), str(n)) for n in range(300)] * 5
    transform = EvalTransform(PreprocessConfig(224, "squash", 1.0, "bicubic", *HALF))
    with contextlib.closing(iter_image_batches(refs, transform, batch_size=300, workers=1)) as batches:
        next(batches)
        workers = multiprocessing.active_children()
    assert [worker.exitcode for worker in workers] == [0]


def test_workers_end_with_a_killed_main_process(tmp_path: Path) -> None:
    """The parent process of a worker is the fork server, which survives."""
    assert run_in_process(_start_workers_and_die, tmp_path / "workers.txt") == -signal.SIGKILL
    for worker in map(int, (tmp_path / "workers.txt").read_text().split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(worker).wait(HANG_TIMEOUT)


def _start_workers_and_die(path: Path) -> None:
    images.MIN_IMAGES_FOR_WORKERS = 0
    start_fork_server()
    os.environ["SET_BY_A_TEST"] = "1"
    refs = [InMemoryImage(encode(photo(), "PNG"), str(n)) for n in range(8)]
    read_variable = partial(os.getenvb, b"SET_BY_A_TEST")  # the workers would import this module for a function of it
    batches = iter_image_batches(refs, read_variable, batch_size=2, workers=2)
    assert next(batches) == ([0, 1], [b"1", b"1"], {})
    path.write_text(" ".join(str(worker.pid) for worker in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)


# ---- damaged and unusual files --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["WEBP", "JPEG", "PNG"])
@pytest.mark.parametrize("exif", [b"garbage!", b"II", b"II*\0\x08\0\0\0" + struct.pack("<H", 65535)], ids=repr)
def test_image_with_damaged_exif_is_not_rotated(kind: str, exif: bytes) -> None:
    data = encode(Image.new("RGB", (20, 10)), kind, exif=b"Exif\0\0" + exif)
    assert decode_image(data).shape == (3, 10, 20)


@pytest.mark.parametrize("step", ["decoder", "transform"])
def test_decode_or_error_reports_any_exception(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no memory")

    if step == "decoder":
        monkeypatch.setattr(images, "_decode_with_torchvision", fail)
    assert "MemoryError: no memory" in decode_or_return_error(InMemoryImage(encode(photo(), "JPEG")), fail)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), r"Canon RAW \(CR2\) is not supported. Convert the image to JPEG"),
        (b"\0\0\0\x18ftypcrx " + bytes(99), "CR3"),
        (b'<?xml version="1.0"?>\n<!-- drawn by hand -->\n<svg xmlns="x"></svg>', "SVG is not supported"),
        (b"", "the file is empty"),
        (b"hello", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS is not supported"),
        # The first image in a DNG or NEF file is a reduced-size preview.
        (encode(photo(), "TIFF", tiffinfo={254: 1}), "RAW photos are not supported"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "not an image"),
        (png_header(4, 4)[:33] + chunk(b"IDAT", b"garbage") + chunk(b"IEND", b""), "unreadable image"),
    ],
    ids=["CR2", "CR3", "SVG", "empty", "text", "EPS", "preview", "PNG without chunks", "damaged pixels"],
)
def test_decode_image_rejects_other_formats_and_damaged_images(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode_image(data)


def heic_bytes(image: Image.Image, **options: Any) -> bytes:
    pytest.importorskip("pillow_heif").register_heif_opener()
    return encode(image, "HEIF", **options)


def test_decode_image_reads_heic() -> None:
    image = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    pixels = decode_image(heic_bytes(image, quality=95))
    assert (pixels.int() - torch.from_numpy(np.array(image)).permute(2, 0, 1).int()).abs().max() <= 3
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    assert decode_image(heic_bytes(image, exif=exif.tobytes())).shape == (3, 40, 30)


def test_heic_has_the_limits_of_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic_bytes(photo(64, 64))
    assert load_image(data).shape == (3, 64, 64)
    with pytest.raises(ImageError, match="HEIC images are not accepted in requests"):
        load_request_image(data, 10**9)
    monkeypatch.setattr(images, "MAX_PIXELS", 4000)
    with pytest.raises(ImageError, match="64 x 64 pixels; the limit is 4,000 pixels"):
        decode_image(data)


def test_heic_without_pillow_heif_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    image_header._register_heic_plugin.cache_clear()
    with pytest.raises(ImageError, match=r"pip install 'llm2clip\[photos\]', or convert the image to JPEG"):
        decode_image(b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(99))
