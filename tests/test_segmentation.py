"""Zero-shot segmentation: readers of the data sets, sliding window, assignment of classes, and the metrics."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from torch import Tensor

from dense_fixtures import CELL, LABEL_SIZE, VOC, Layout, colour_embeddings, make_coco, make_segmentation
from llm2clip.data.images import load_image
from llm2clip.evaluate.benchmarks import BENCHMARKS, get_benchmarks
from llm2clip.evaluate.benchmarks.base import SegmentationData
from llm2clip.evaluate.benchmarks.coco_instances import decode_mask
from llm2clip.evaluate.benchmarks.segmentation import read_class_names
from llm2clip.evaluate.metrics import draw_bootstrap_counts
from llm2clip.evaluate.segmentation import (
    build_segmentation_section,
    compute_class_iou,
    compute_segmentation_metrics,
    segment_images,
)
from llm2clip.io_utils import DataFormatError, MissingFileError
from llm2clip.models.vision import segmentation
from llm2clip.models.vision.segmentation import (
    PixelScores,
    WindowAxis,
    WindowResizer,
    arrange_window_scores,
    extract_windows,
    segment,
)
from llm2clip.reports import ReportImageGroup

STUFF = Layout("coco/val2017/1.jpg", "coco/stuffthingmaps/val2017/1.png")
ADE20K = Layout(
    "ADEChallengeData2016/images/validation/ADE_val_1.jpg", "ADEChallengeData2016/annotations/validation/ADE_val_1.png"
)
CITYSCAPES = Layout(
    "cityscapes/leftImg8bit/val/ulm/ulm_1_leftImg8bit.png", "cityscapes/gtFine/val/ulm/ulm_1_gtFine_labelIds.png"
)


# ---- readers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "values", "expected", "names"),
    [
        ("voc20", VOC, [0, 1, 20, 255], [255, 0, 19, 255], {0: "aeroplane"}),
        ("voc21", VOC, [0, 1, 20, 255], [0, 1, 20, 255], {0: "background", 1: "aeroplane"}),
        # Values of COCO-Stuff are category ids minus one.
        ("coco-stuff", STUFF, [0, 9, 12, 89, 91, 181, 255], [0, 9, 11, 79, 80, 170, 255],
         {0: "person", 9: "trafficlight", 11: "stopsign", 79: "toothbrush", 80: "banner", 170: "wood"}),
        ("ade20k", ADE20K, [0, 1, 150], [255, 0, 149], {0: "wall"}),
        ("cityscapes", CITYSCAPES, [0, 7, 8, 11, 24, 33, 29], [255, 0, 1, 2, 11, 18, 255],
         {0: "road", 11: "person", 18: "bicycle"}),
    ],
)  # fmt: skip
def test_labels_are_read_as_class_indices(
    name: str, layout: Layout, values: list[int], expected: list[int], names: dict[int, str], tmp_path: Path
) -> None:
    root = tmp_path / "VOCdevkit/VOC2012" if layout is VOC else tmp_path
    layout.save(root, values)
    data = BENCHMARKS[name].load(BENCHMARKS[name].find_folder(tmp_path))
    labels = data.read_labels(0)
    assert [str(image) for image in data.images] == [str(root / layout.image)]
    assert labels.shape == LABEL_SIZE[::-1] and labels.dtype == np.uint8
    assert labels[labels != 255].max() < len(data.names)
    assert labels.flatten()[: len(values)].tolist() == expected
    assert {label: data.get_class_name(label) for label in names} == names


def test_protocols_of_data_sets_differ(tmp_path: Path) -> None:
    VOC.save(tmp_path, [1])
    data = BENCHMARKS["voc21"].load(tmp_path)
    assert len(data.names) == 21 and data.names[0][:2] == ["sky", "wall"] and data.has_background
    assert (data.logit_scale, data.min_probability, data.min_area, data.scale) == (65, 0.1, 0.1, 1.5)
    data = BENCHMARKS["voc20"].load(tmp_path)
    assert (data.logit_scale, data.min_probability, data.min_area, data.has_background) == (40, 0, 0, False)
    for name, layout, scale in (("coco-stuff", STUFF, 2), ("cityscapes", CITYSCAPES, 2.5)):
        layout.save(tmp_path, [11])
        assert BENCHMARKS[name].load(BENCHMARKS[name].find_folder(tmp_path)).scale == scale


def make_coco_object(folder: Path) -> None:
    """Write the generated folder with 80 categories, and add a crowd and a small object on top of the first object."""
    file = make_coco(folder)
    data = json.loads(file.read_text())
    data["categories"] = [{"id": n, "name": f"name {n}"} for n in range(1, 81)]
    width, height = 64, 48
    mask = np.zeros((height, width), np.uint8)
    mask[40:, :8] = 1
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.T.flatten(), [2]]))))  # starts with zeros
    crowd = {"counts": runs.tolist(), "size": [height, width]}
    extra = [{"category_id": 80, "iscrowd": 1, "segmentation": crowd, "area": 64}]
    extra += [{"category_id": 40, "segmentation": [[8, 8, 16, 8, 16, 12, 8, 12]], "area": 32}]
    data["annotations"] = [{"image_id": 10, "bbox": [0, 0, 1, 1], **row} for row in extra] + data["annotations"]
    file.write_text(json.dumps(data))


def test_coco_object_labels_are_drawn_from_polygons_and_run_lengths(tmp_path: Path) -> None:
    make_coco_object(tmp_path / "coco")
    data = BENCHMARKS["coco-object"].load(tmp_path / "coco")
    expected = np.zeros((48, 64), np.uint8)
    expected[4:20, 4:28] = 1
    expected[20:44, 36:56] = 5
    expected[8:12, 8:16] = 40
    expected[40:, :8] = 80
    assert np.array_equal(data.read_labels(0), expected)
    assert data.read_labels(1).shape == (64, 48) and len(data.images) == 3
    assert len(data.names) == 81 and data.names[80] == ["toothbrush"] and "person in shirt" in data.names[1]
    make_coco(tmp_path / "coco")
    with pytest.raises(DataFormatError, match="has 3 categories, but COCO has 80"):
        BENCHMARKS["coco-object"].load(tmp_path / "coco")


def test_every_class_name_file_has_a_source_and_all_classes() -> None:
    sizes = {"voc20": 20, "background": 1, "coco_object": 80}
    sizes |= {"coco_stuff": 171, "ade20k": 150, "cityscapes": 19}
    for name, size in sizes.items():
        names = read_class_names(name)
        assert len(names) == size and all(n and n == n.strip() for row in names for n in row)
        assert not any("github" in n for row in names for n in row), "the line with the source is not a class"


def test_invalid_label_files_are_reported(tmp_path: Path) -> None:
    root = tmp_path / "voc2012"
    VOC.save(root, [1, 21])
    benchmark = BENCHMARKS["voc20"]
    file = root / VOC.labels
    with pytest.raises(DataFormatError, match=r"2007_1.png contains the pixel value 21, which is not assigned"):
        benchmark.load(root).read_labels(0)
    Image.new("RGB", LABEL_SIZE).save(file)
    with pytest.raises(DataFormatError, match=r"2007_1.png: a label file must have a single 8-bit channel .*RGB"):
        benchmark.load(root).read_labels(0)
    VOC.save(root, [1])
    content = file.read_bytes()
    for corrupt in (b"x", content[: content.index(b"IDAT") + 6], content.replace(b"IDAT", b"I\0\0\0")):
        file.write_bytes(corrupt)
        with pytest.raises(DataFormatError, match=r"2007_1.png: cannot read the label file"):
            benchmark.load(root).read_labels(0)
    file.unlink()
    with pytest.raises(MissingFileError, match=r"1 of 1 images listed in .*val.txt are missing, e.g. .*2007_1.png"):
        benchmark.load(root)
    (root / VOC.split).write_text("\n")
    with pytest.raises(MissingFileError, match=r"val.txt contains no images"):
        benchmark.load(root)
    with pytest.raises(MissingFileError, match="contains neither VOC2012/JPEGImages nor JPEGImages"):
        benchmark.load(tmp_path)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[4, 4, 9, 4, 9, 1e12]], r"a polygon is far outside the image \(64 x 48 pixels\)"),
        ([[4, 4, 9, 4, 9, float("nan")]], "a polygon is far outside the image"),
        ([[4, 4]], "input type is not supported"),
        ([], "need at least one array"),
        ({"counts": [5, 6], "size": [48, 64]}, "the run lengths cover 11 pixels, but the image has 3072"),
        ({"counts": [5, 3067], "size": [64, 48]}, r"the mask size is \[64, 48\], but the image size is"),
        ({"counts": [5, 3067.0], "size": [48, 64]}, "run lengths must be non-negative integers"),
        ({"counts": [-1, 3073], "size": [48, 64]}, "run lengths must be non-negative integers"),
        ({"counts": "5", "size": [48, 64]}, "the run lengths cover 5 pixels, but the image has 3072"),
        ({"counts": "5X", "size": [48, 64]}, "the compressed run lengths are truncated"),
        ({"counts": "5 ", "size": [48, 64]}, "the compressed run lengths contain the invalid character ' '"),
        ({"counts": "o" * 99, "size": [48, 64]}, "the compressed run lengths contain a number that is too large"),
        (None, "'NoneType' object is not subscriptable"),
    ],
)
def test_invalid_masks_of_coco_are_reported(segmentation: object, message: str, tmp_path: Path) -> None:
    make_coco_object(tmp_path / "coco")
    file = tmp_path / "coco/annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["segmentation"] = segmentation
    content["annotations"][0]["id"] = 77
    file.write_text(json.dumps(content))
    data = BENCHMARKS["coco-object"].load(tmp_path / "coco")
    with pytest.raises(DataFormatError, match=f"val2017.json: annotation 77 has an invalid mask: .*{message}"):
        data.read_labels(0)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_decode_mask_equals_pycocotools(density: float) -> None:
    rng = np.random.default_rng(0)
    mask = (rng.random((150, 70)) < density).astype(np.uint8)
    mask[20:140, 5:60] |= density > 0  # long runs need several characters
    rle = coco_mask.encode(np.asfortranarray(mask))
    compressed = {"size": [150, 70], "counts": rle["counts"].decode()}
    assert np.array_equal(decode_mask(compressed, 150, 70), mask > 0)
    changes = np.flatnonzero(np.diff(mask.T.flatten(), prepend=0))  # the positions at which a new run starts
    runs = np.diff([0, *changes, mask.size]).tolist()
    assert np.array_equal(decode_mask({"size": [150, 70], "counts": runs}, 150, 70), mask > 0)


# ---- sliding window ------------------------------------------------------------------------------------------------


def reference_window_scores(image: Tensor, cells: Tensor, window: int, size: tuple[int, int]) -> Tensor:
    """SCLIP's procedure: upsample each window, add and count, divide, and resize.

    Args:
        image: Resized image, (3, H, W).
        cells: Cell scores of the windows, (windows, K, h, w), row by row.
    """
    height, width = image.shape[1:]
    stride = window // 2
    total = torch.zeros(1, cells.shape[1], height, width, dtype=torch.float64)
    count = torch.zeros(1, 1, height, width, dtype=torch.float64)
    n = 0
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            block = F.interpolate(cells[n : n + 1].double(), size=(bottom - top, right - left), mode="bilinear")
            total[:, :, top:bottom, left:right] += block
            count[:, :, top:bottom, left:right] += 1
            n += 1
    assert n == len(cells)
    return F.interpolate(total / count, size=size, mode="bilinear")[0]


@pytest.mark.parametrize("size", [(48, 64), (70, 31), (300, 40), (16, 200), (37, 37)])
def test_pixel_scores_match_the_procedure_of_sclip(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "TILE_ELEMENTS", 3 * size[1] * 7)  # tiles of seven rows
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
    transform = WindowResizer(window=16, cell_size=4, scale=1.5)
    resized, original = transform(image)
    rows, columns = transform.place_windows(*size)
    assert original == size and resized.shape == (3, rows.length, columns.length)
    windows = extract_windows(resized, rows, columns)
    cells = torch.randn(len(windows), 3, windows.shape[2] // 4, windows.shape[3] // 4, generator=generator)
    grid = arrange_window_scores(cells.permute(0, 2, 3, 1), rows, columns)
    scores = PixelScores(
        grid, rows.build_pixel_matrix(cells.shape[2], size[0]), columns.build_pixel_matrix(cells.shape[3], size[1])
    )
    tiles = list(scores.iterate_tiles())
    assert [tile.start for tile, _ in tiles] == list(range(0, size[0], 7))
    result = torch.cat([tile for _, tile in tiles], 1)
    expected = reference_window_scores(resized, cells, 16, size)
    torch.testing.assert_close(result.double(), expected, atol=2e-6, rtol=0)


def test_images_are_resized_as_by_mmsegmentation() -> None:
    """The sizes are those of mmcv's `rescale_size` with scale=(2048, 336), (2048, 448) and (2048, 560)."""
    transform = WindowResizer(window=224, cell_size=16, scale=1.5)
    for size, expected in {(480, 640): (336, 448), (375, 500): (336, 448), (500, 333): (505, 336)}.items():
        rows, columns = transform.place_windows(*size)
        assert (rows.length, columns.length) == expected
    rows, columns = transform.place_windows(100, 1000)  # limited by the longer side: 2048 / 1000 * 100 = 204.8
    assert columns.length == 2048 and rows.length == rows.window == 208 and rows.starts == (0,)
    rows, columns = WindowResizer(window=224, cell_size=16, scale=2.0).place_windows(
        120, 640
    )  # also limited: 2048 / 640
    assert (rows.length, columns.length) == (384, 2048)
    rows, columns = WindowResizer(window=224, cell_size=16, scale=2.5).place_windows(1024, 2048)
    assert (rows.length, columns.length) == (560, 1120)
    assert WindowAxis.from_length(448, 224, 16).starts == (0, 112, 224)
    assert WindowAxis.from_length(505, 224, 16).starts == (0, 112, 224, 281)
    assert WindowAxis.from_length(224, 224, 16).starts == (0,)


# ---- classes -------------------------------------------------------------------------------------------------------


def identity_scores(scores: Tensor) -> PixelScores:
    """Return pixel scores, (K, H, W), that need no interpolation."""
    return PixelScores(scores, torch.eye(scores.shape[1]), torch.eye(scores.shape[2]))


def reference_segmentation(
    scores: Tensor, counts: list[int], logit_scale: float, min_probability: float, min_area: float
) -> Tensor:
    """SCLIP's post-processing on the complete image, in float64."""
    probabilities = (logit_scale * scores.double()).softmax(0)
    classes = torch.stack([part.amax(0) for part in probabilities.split(counts)])
    if min_area:
        predictions = F.one_hot(classes.argmax(0), len(counts)).double()
        areas = predictions[:, :, 1:].sum((0, 1))
        classes[1:] *= (areas > min_area * areas.sum()).double()[:, None, None]
    result = classes.argmax(0)
    result[classes.amax(0) < min_probability] = 0
    return result


@pytest.mark.parametrize(
    ("counts", "logit_scale", "min_probability", "min_area"),
    [([1, 1, 1, 1, 1], 40.0, 0.0, 0.0), ([2, 1, 2], 40.0, 0.0, 0.0), ([2, 1, 2], 8.0, 0.4, 0.0),
     ([1, 1, 1, 2], 8.0, 0.3, 0.3), ([2, 1, 2], 8.0, 0.0, 0.45)],
)  # fmt: skip
def test_segment_matches_the_post_processing_of_sclip(
    counts: list[int], logit_scale: float, min_probability: float, min_area: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segmentation, "TILE_ELEMENTS", 5 * 30 * 4)  # tiles of four rows
    scores = 0.3 * torch.randn(5, 22, 30, generator=torch.Generator().manual_seed(0))
    tiles = segment(identity_scores(scores), counts, logit_scale, min_probability, min_area)
    labels = torch.cat([tile for _, tile in tiles])
    expected = reference_segmentation(scores, counts, logit_scale, min_probability, min_area)
    assert torch.equal(labels, expected)
    plain = reference_segmentation(scores, counts, logit_scale, 0, 0)
    if min_probability or min_area:
        assert not torch.equal(expected, plain), "the case must test something"


# ---- evaluation ----------------------------------------------------------------------------------------------------


def naive_predictions(data: SegmentationData) -> list[np.ndarray]:
    """Predict the halves of the images: away from the border between the halves, the colours are exact."""
    predictions = []
    for ref in data.images:
        pixels = np.asarray(Image.open(str(ref)))
        predictions.append(pixels.argmax(-1).astype(np.uint8))
    return predictions


def test_segmentation_of_coloured_images_matches_sklearn(tmp_path: Path) -> None:
    data = make_segmentation(tmp_path)
    embeddings = colour_embeddings()
    result = segment_images(data, embeddings, ["plain", "sclip"])
    assert result.images == [0, 1, 2] and set(result.examples) == {0, 1, 2}
    for index, prediction in enumerate(naive_predictions(data)):
        maps = result.examples[index]
        assert np.array_equal(maps["labels"], data.read_labels(index))
        border = np.abs(np.arange(prediction.shape[1]) - (prediction.shape[1] - 1) / 2) < 2 * CELL
        assert np.array_equal(maps["plain"][:, ~border], prediction[:, ~border])
        swapped = np.array([2, 1, 0], np.uint8)[prediction]
        assert np.array_equal(maps["sclip"][:, ~border], swapped[:, ~border])
    labels = np.concatenate([maps["labels"].flatten() for maps in result.examples.values()])
    for variant in ("plain", "sclip"):
        predicted = np.concatenate([maps[variant].flatten() for maps in result.examples.values()])[labels != 255]
        correct = labels[labels != 255]
        metrics = compute_segmentation_metrics(result.counts[variant], result.images).values
        iou = 100 * jaccard_score(correct, predicted, average=None)
        assert compute_class_iou(result.counts[variant]) == pytest.approx(iou.tolist())
        assert metrics["mIoU"] == pytest.approx(iou.mean())
        assert metrics["pixel accuracy"] == pytest.approx(100 * accuracy_score(correct, predicted))
        assert metrics["mean class accuracy"] == pytest.approx(100 * balanced_accuracy_score(correct, predicted))


def test_learned_logit_scale_is_evaluated_next_to_the_scale_of_the_protocol(tmp_path: Path) -> None:
    data = dataclasses.replace(make_segmentation(tmp_path), logit_scale=50, min_probability=0.6)
    embeddings = colour_embeddings()
    embeddings.model.logit_scale = lambda: 1.0
    result = segment_images(data, embeddings, ["plain"])
    assert result.logit_scales == {"plain": 50, "plain, learned scale": 1}
    # The probability of the right class is 0.6 only with the scale of the protocol: e / (e + 3) < 0.6.
    assert result.counts["plain, learned scale"][:, 2, 1:].sum() == 0
    assert result.counts["plain"][:, 2, 1:].sum() > 0
    result = segment_images(dataclasses.replace(data, min_probability=0), embeddings, ["plain"])
    assert list(result.counts) == ["plain"], "without a minimum probability, the scale does not affect the result"


def test_unusable_images_and_labels_are_skipped(tmp_path: Path) -> None:
    data = make_segmentation(tmp_path)
    (tmp_path / "1.png").write_bytes(b"x")
    labels = [data.read_labels(0), data.read_labels(1), data.read_labels(2)[:10]]
    data = dataclasses.replace(data, read_labels=labels.__getitem__)
    embeddings = colour_embeddings(max_skipped=1.0)
    result = segment_images(data, embeddings, ["plain"])
    assert result.images == [0] and embeddings.log.skipped == {"unusable image": 2}
    assert "the label map has 64 x 10 pixels, but the image has 64 x 48 pixels" in embeddings.log.examples[1]


def test_segmentation_intervals_match_a_naive_bootstrap() -> None:
    """Class 3 is labelled in one image only, and class 4 does not occur."""
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 50, (9, 5, 5))
    confusion[1:, 3] = 0
    confusion[:, 4] = 0
    confusion[:, :, 4] = 0
    counts = np.stack([np.einsum("ncc->nc", confusion), confusion.sum(2), confusion.sum(1)], 1)
    result = compute_segmentation_metrics(counts, range(9))
    metrics, intervals = result.values, result.intervals

    def naive(weights: np.ndarray) -> list[float]:
        total = np.tensordot(weights, confusion, 1)
        ious, accuracies = [], []
        for c in range(5):
            union = total[c].sum() + total[:, c].sum() - total[c, c]
            ious += [total[c, c] / union] if union else []
            accuracies += [total[c, c] / total[c].sum()] if total[c].sum() else []
        return [100 * np.mean(ious), 100 * np.trace(total) / total.sum(), 100 * np.mean(accuracies)]

    assert list(metrics.values()) == pytest.approx(naive(np.ones(9)))
    samples = np.array([naive(weights.numpy()) for weights in draw_bootstrap_counts(9)])
    expected = np.quantile(samples, [0.025, 0.975], axis=0).T
    assert np.array(list(intervals.values())) == pytest.approx(expected)
    assert compute_class_iou(counts)[4] is None


def test_pictures_show_labels_and_predictions_without_the_background(tmp_path: Path) -> None:
    data = make_segmentation(tmp_path)
    result = segment_images(data, colour_embeddings(), ["plain"])
    result.examples = {0: {"labels": np.where(np.arange(64) < 32, 0, 1).repeat(48).reshape(64, 48).T.astype(np.uint8)}}
    for has_background in (False, True):
        shown = dataclasses.replace(data, has_background=has_background)
        *_, examples = build_segmentation_section(shown, result)
        assert isinstance(examples, ReportImageGroup)
        image, overlay = (load_image(item.jpeg).float() for item in examples.images)
        change = (overlay - image).abs().sum(0)
        assert change[:, 40:].mean() > 20, "class 1 is coloured"
        names = [name for name, _ in examples.legend]
        if has_background:
            assert change[:, :24].mean() < 8 and names == ["green"]
        else:
            assert names == ["red", "green"]


# ---- the user's images ---------------------------------------------------------------------------------------------


def make_mask_folder(folder: Path, classes: str = "red\ngreen, grass\nblue\n") -> SegmentationData:
    """Write the images and labels of `make_segmentation` as a folder of images, masks and class names."""
    data = make_segmentation(folder / "images")
    (folder / "masks").mkdir()
    for index in range(3):
        Image.fromarray(data.read_labels(index)).save(folder / f"masks/{index}.png")
    (folder / "classes.txt").write_text(classes)
    return data


def test_folder_of_masks_is_read_with_its_class_names(tmp_path: Path) -> None:
    expected = make_mask_folder(tmp_path)
    [benchmark] = get_benchmarks([f"segmentation:{tmp_path}"], ["a {}", "the {}"])
    data = benchmark.load(benchmark.find_folder(Path("unused")))
    assert benchmark.kind == "segmentation" and data.names == [["red"], ["green", "grass"], ["blue"]]
    assert list(data.templates) == ["a {}", "the {}"] and not data.has_background and data.min_probability == 0
    for index in range(3):
        assert np.array_equal(data.read_labels(index), expected.read_labels(index))
        assert str(data.images[index]) == str(expected.images[index])
    (tmp_path / "classes.txt").write_text("background\ngreen\nblue\n")
    data = benchmark.load(tmp_path)
    assert data.has_background and data.get_class_name(0) == "background" and data.names[0][:2] == ["sky", "wall"]
    assert (data.logit_scale, data.min_probability) == (50, 0.1)


def test_invalid_folders_of_masks_are_reported(tmp_path: Path) -> None:
    make_mask_folder(tmp_path, classes="red\ngreen\n")
    [benchmark] = get_benchmarks([f"segmentation:{tmp_path}"], ["a {}"])
    with pytest.raises(DataFormatError, match=r"2.png contains the pixel value 2, which is not assigned to any class"):
        benchmark.load(tmp_path).read_labels(2)
    for classes in ("red\n, x\n", "red\n\nblue\n", "".join(f"c{n}\n" for n in range(256)), ""):
        (tmp_path / "classes.txt").write_text(classes)
        with pytest.raises(DataFormatError, match=r"classes.txt must contain 1 to 255 lines, one per class"):
            benchmark.load(tmp_path)
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/0.jpg")
    with pytest.raises(DataFormatError, match="contains several images with the name '0'"):
        benchmark.load(tmp_path)
    for name in ("0.jpg", "0.png"):
        (tmp_path / "images" / name).unlink()
    with pytest.raises(MissingFileError, match=r"images has no image for 1 mask, e.g. .*0.png"):
        benchmark.load(tmp_path)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(MissingFileError, match=r"has no classes.txt"):
        benchmark.load(tmp_path)


def test_masks_of_the_users_coco_file_are_read(tmp_path: Path) -> None:
    [benchmark] = get_benchmarks([f"segmentation:{make_coco(tmp_path)}"])
    data = benchmark.load(benchmark.find_folder(Path("unused")))
    labels = np.zeros((48, 64), np.uint8)
    labels[4:20, 4:28], labels[20:44, 36:56] = 1, 3
    assert np.array_equal(data.read_labels(0), labels) and len(data.templates) == 80
    assert [data.get_class_name(label) for label in range(4)] == ["background", "red", "green", "blue"]


@pytest.mark.data
def test_coco_object_on_real_masks(real_data: Path) -> None:
    """Our masks of objects that do not overlap equal pycocotools' masks, and cover what the annotations cover."""
    from pycocotools.coco import COCO

    benchmark = BENCHMARKS["coco-object"]
    folder = benchmark.find_folder(real_data)
    data = benchmark.load(folder)
    coco = COCO(folder / "annotations/instances_val2017.json")
    for index in range(0, len(data.images), 10):
        labels = data.read_labels(index)
        image_id = int(Path(str(data.images[index])).stem)
        union = np.zeros(labels.shape, bool)
        for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
            union |= coco.annToMask(annotation) > 0
        assert np.array_equal(labels > 0, union)
