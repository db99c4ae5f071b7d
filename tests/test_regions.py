"""Region classification: the reader of boxes, crops, RoIAlign on dense features, and the metrics."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dense_fixtures import colour_embeddings, colour_model, make_coco, make_segmentation
from llm2clip.data import images
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.evaluate.benchmarks import BENCHMARKS, get_benchmarks
from llm2clip.evaluate.benchmarks.base import RegionData
from llm2clip.evaluate.embeddings import PrecomputedEmbeddings
from llm2clip.evaluate.metrics import BootstrapMetrics, draw_bootstrap_counts
from llm2clip.evaluate.regions import (
    RegionPredictions,
    classify_regions,
    compute_class_accuracy,
    compute_region_metrics,
    crop_region,
    encode_boxes,
)
from llm2clip.evaluate.segmentation import segment_images
from llm2clip.io_utils import DataFormatError, MissingFileError

# ---- reader --------------------------------------------------------------------------------------------------------


def test_coco_boxes_are_clipped_and_crowds_and_degenerate_boxes_are_excluded(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "coco")
    data = json.loads(file.read_text())
    extra = [{"bbox": [50, 40, 30, 30], "area": 5}, {"bbox": [3, 3, 0.5, 9], "area": 4}]
    extra += [{"bbox": [3, 3, 9, 9], "area": 4, "iscrowd": 1}]
    data["annotations"] += [{"id": n, "image_id": 10, "category_id": 3} | row for n, row in enumerate(extra)]
    data["categories"][1]["name"] = "traffic_light"
    data["images"].append({"id": 99, "file_name": "without boxes.png", "width": 9, "height": 9})
    file.write_text(json.dumps(data))
    result = BENCHMARKS["coco-boxes"].load(BENCHMARKS["coco-boxes"].find_folder(tmp_path))
    assert [Path(str(ref)).name for ref in result.images] == ["0.png", "1.png", "2.png"]
    assert result.sizes == [(64, 48), (48, 64), (64, 48)]
    assert result.boxes[0].tolist() == [[4, 4, 28, 20], [36, 20, 56, 44], [50, 40, 64, 48]]
    assert result.labels[0].tolist() == [0, 2, 1] and result.areas[0].tolist() == [384, 480, 5]
    assert list(result.names) == ["red", "traffic light", "blue"]
    assert result.excluded == {"crowd": 1, "smaller than a pixel": 1}
    assert len(result.templates) == 80 and "a photo of a {}." in result.templates


def test_lvis_boxes_find_images_of_both_splits_by_url(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "coco")
    data = json.loads(file.read_text())
    (tmp_path / "coco/train2017").mkdir()
    (tmp_path / "coco/val2017/1.png").rename(tmp_path / "coco/train2017/1.png")
    for image in data["images"]:
        split = "train2017" if image["id"] == 11 else "val2017"
        image["coco_url"] = f"http://images.cocodataset.org/{split}/{image.pop('file_name')}"
    for annotation in data["annotations"]:
        del annotation["iscrowd"]
    (tmp_path / "coco/annotations/lvis_v1_val.json").write_text(json.dumps(data))
    result = BENCHMARKS["lvis-boxes"].load(BENCHMARKS["lvis-boxes"].find_folder(tmp_path))
    assert [Path(str(ref)).parent.name for ref in result.images] == ["val2017", "train2017", "val2017"]


def test_boxes_prefix_reads_a_file_beside_its_images(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "coco")
    mine = file.rename(tmp_path / "coco/val2017/mine.json")
    [benchmark] = get_benchmarks([f"boxes:{mine}"])
    assert benchmark.kind == "regions" and len(benchmark.load(benchmark.find_folder(Path("unused"))).images) == 3
    [benchmark] = get_benchmarks([f"boxes:{tmp_path}/coco/val2017/other.json"])
    with pytest.raises(MissingFileError, match=r"no other.json"):
        benchmark.load(benchmark.find_folder(Path("unused")))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("", {"images": []}, "lists no images"),
        ("", {"annotations": []}, "contains no boxes except crowds"),
        ("", {"categories": [{"id": 1, "name": "_ "}]}, "category 1 has no name"),
        ("", {"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "several categories have the id 1"),
        ("images", {"id": 11}, "several images have the id 11"),
        ("images", {"width": "64"}, r"image 10 has width '64' .* positive integers"),
        ("images", {"height": 0}, "image 10 has width"),
        ("images", {"width": None}, "image 10 has width"),
        ("images", {"width": 10**6, "height": 10**6}, "image 10 has width"),
        ("annotations", {"image_id": 7}, "annotation 100 refers to image 7, which does not exist"),
        ("annotations", {"image_id": "10"}, "annotation 100 refers to image '10', which does not exist"),
        ("annotations", {"category_id": 2}, "annotation 100 refers to category 2, which does not exist"),
        ("annotations", {"bbox": [1, 2, 3]}, r"annotation 100 has the bbox \[1, 2, 3\]. .* \[left, top, width"),
        ("annotations", {"bbox": [1, 2, 3, float("nan")]}, "annotation 100 has the bbox"),
        ("annotations", {"bbox": [1, 2, 3, "4"]}, "annotation 100 has the bbox"),
        ("annotations", {"bbox": [1, 2, -3, 4]}, "annotation 100 has the bbox"),
        ("annotations", {"bbox": None}, "annotation 100 has the bbox None"),
    ],
)
def test_invalid_coco_files_are_reported(part: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """`changes` apply to the file as a whole, or to its first image or annotation."""
    file = make_coco(tmp_path / "coco")
    content = json.loads(file.read_text())
    if part:
        content[part][0] |= changes
    else:
        content |= changes
    file.write_text(json.dumps(content))
    with pytest.raises(DataFormatError, match=rf"instances_val2017.json.*{message}"):
        BENCHMARKS["coco-boxes"].load(tmp_path / "coco")


def test_categories_with_the_same_name_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = make_coco(tmp_path / "coco")
    content = json.loads(file.read_text())
    content["categories"][2]["name"] = " red_"
    file.write_text(json.dumps(content))
    assert list(BENCHMARKS["coco-boxes"].load(tmp_path / "coco").names) == ["red", "green", "red"]
    assert "2 categories have the name 'red', so the model cannot distinguish them" in capsys.readouterr().out


def test_files_without_images_and_malformed_files_are_reported(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "coco")
    (tmp_path / "coco/val2017/1.png").unlink()
    with pytest.raises(MissingFileError, match=r"1 of 3 images listed in .*instances_val2017.json are missing"):
        BENCHMARKS["coco-boxes"].load(tmp_path / "coco")
    file.write_text("[" * 100_000)
    with pytest.raises(DataFormatError, match=r"instances_val2017.json: not JSON"):
        BENCHMARKS["coco-boxes"].load(tmp_path / "coco")
    file.write_text(json.dumps({"images": []}))
    with pytest.raises(DataFormatError, match=r"a row does not match the coco-boxes format \(KeyError\('categories'\)"):
        BENCHMARKS["coco-boxes"].load(tmp_path / "coco")


# ---- crops and RoIAlign --------------------------------------------------------------------------------------------


def test_crop_is_enlarged_clipped_and_padded_to_a_square() -> None:
    image = torch.arange(3 * 20 * 40).reshape(3, 20, 40).remainder(251).add(1).to(torch.uint8)
    crop = crop_region(image, [10, 8, 26, 12])  # 16 x 4 -> 24 x 6, from (6, 7) to (30, 13)
    assert crop.shape == (3, 24, 24)
    assert torch.equal(crop[:, 9:15], image[:, 7:13, 6:30])
    assert not crop[:, :9].any() and not crop[:, 15:].any()
    crop = crop_region(image, [0, 0, 40, 20])  # clipped to the image
    assert crop.shape == (3, 40, 40) and torch.equal(crop[:, 10:30], image)
    crop = crop_region(image, [39.2, 19.1, 40, 20])  # less than a pixel
    assert crop.numel() > 0 and torch.equal(crop[:, -1, -1], image[:, 19, 39])


def naive_roi_align(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    """RoIAlign with one output cell, aligned, in float64: the mean of bilinear samples on a regular grid.

    There are ceil(height) x ceil(width) samples (arXiv 1703.06870; detectron2's `aligned`). Cell i has its centre at
    i + 0.5. Samples more than one cell outside count as zero; others are clamped.
    """
    h, w, dim = features.shape
    left, top, right, bottom = box.astype(np.float64)
    ny, nx = int(np.ceil(bottom - top)), int(np.ceil(right - left))
    total = np.zeros(dim)
    for iy in range(ny):
        for ix in range(nx):
            y = min(max(top + (iy + 0.5) * (bottom - top) / ny - 0.5, 0), h - 1)
            x = min(max(left + (ix + 0.5) * (right - left) / nx - 0.5, 0), w - 1)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            total += (1 - y + y0) * ((1 - x + x0) * features[y0, x0] + (x - x0) * features[y0, x1])
            total += (y - y0) * ((1 - x + x0) * features[y1, x0] + (x - x0) * features[y1, x1])
    return total / (ny * nx)


@pytest.mark.parametrize("method", ["crop", "plain"])
def test_boxes_are_encoded_in_batches_of_images(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(48, 64), (64, 48), (48, 64), (30, 90)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    boxes = [torch.tensor([[3.0, 5, 20, 21], [0, 0, 30, 9]]), torch.zeros(0, 4), torch.tensor([[9.0, 8, 40, 30]])]
    boxes.append(torch.tensor([[50.0, 2, 80, 29]]))
    model = colour_model()
    results = encode_boxes(model, images, boxes, method)
    assert [len(result) for result in results] == [2, 0, 1, 1]
    for image, image_boxes, result in zip(images, boxes, results, strict=True):
        [expected] = encode_boxes(model, [image], [image_boxes], method)
        torch.testing.assert_close(result, expected)
        for box, embedding in zip(image_boxes, result, strict=True):
            torch.testing.assert_close(embedding, encode_boxes(model, [image], [box[None]], method)[0][0])
    assert encode_boxes(model, [], [], method) == []


# ---- classification ------------------------------------------------------------------------------------------------


def test_all_methods_recognise_coloured_boxes_and_decode_each_image_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_coco(tmp_path / "coco")
    data = BENCHMARKS["coco-boxes"].load(tmp_path / "coco")
    decoded: Counter[str] = Counter()
    load_image = images.load_image

    def counting_load_image(ref: Any) -> Any:
        decoded[str(ref)] += 1
        return load_image(ref)

    monkeypatch.setattr(images, "load_image", counting_load_image)
    predictions = classify_regions(data, colour_embeddings(), ["plain", "sclip"])
    assert list(predictions) == ["crop", "plain", "sclip"] and set(decoded.values()) == {1} and len(decoded) == 3
    for method in ("crop", "plain"):
        assert predictions[method].rank.tolist() == [0] * 5
        assert predictions[method].predicted.tolist() == np.concatenate(data.labels).tolist() == [0, 2, 1, 0, 2]
        assert predictions[method].margin.tolist() == [0] * 5
    assert predictions["plain"].image.tolist() == [0, 0, 1, 1, 2]
    assert predictions["plain"].region.tolist() == [0, 1, 0, 1, 0]
    assert predictions["sclip"].predicted.tolist() == [2, 0, 1, 2, 0], "this variant swaps red and blue"
    assert predictions["sclip"].margin[0] > 0.5
    data = dataclasses.replace(data, names=["red", "green", "red"])  # label 2 has the name of label 0
    equal_scores = classify_regions(data, colour_embeddings(), ["sclip"])["sclip"]
    assert (equal_scores.predicted[1], equal_scores.rank[1]) == (0, 1), "the first of several equal classes wins"


def test_unusable_images_are_skipped_and_counted(tmp_path: Path) -> None:
    file = make_coco(tmp_path / "coco")
    (tmp_path / "coco/val2017/1.png").write_bytes(b"not an image")
    contents = json.loads(file.read_text())
    contents["images"][2]["width"] = 70
    file.write_text(json.dumps(contents))
    data = BENCHMARKS["coco-boxes"].load(tmp_path / "coco")
    embeddings = colour_embeddings(max_skipped=1.0)
    predictions = classify_regions(data, embeddings, ["plain"])["plain"]
    assert predictions.image.tolist() == [0, 0] and embeddings.log.skipped == {"unusable image": 2}
    assert "not an image" in embeddings.log.examples[0]
    assert "64 x 48 pixels, but its annotations are for an image with 70 x 48" in embeddings.log.examples[1]
    metrics = compute_region_metrics(data, predictions).values
    assert metrics["top-1"] == 100
    with pytest.raises(TooManySkippedError, match="2 of 3 rows skipped"):
        classify_regions(data, colour_embeddings(), ["plain"])
    (tmp_path / "coco/val2017/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 3 images can be used, e.g. .*0.png \(not an image"):
        classify_regions(data, colour_embeddings(max_skipped=1.0), ["plain"])


def test_unsupported_variants_and_sources_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_coco(tmp_path / "coco")
    data = BENCHMARKS["coco-boxes"].load(tmp_path / "coco")
    embeddings = colour_embeddings()
    assert list(classify_regions(data, embeddings, ["naclip", "plain"])) == ["crop", "plain"]
    assert "does not support --dense_variants naclip (supported: plain, sclip)" in capsys.readouterr().out
    segmentation = make_segmentation(tmp_path)
    assert list(segment_images(segmentation, embeddings, ["naclip", "plain"]).counts) == ["plain"]
    with pytest.raises(ValueError, match=r"does not support --dense_variants naclip \(supported: plain, sclip\)"):
        segment_images(segmentation, embeddings, ["naclip"])
    embeddings.model.dense = None
    assert list(classify_regions(data, embeddings, ["plain"])) == ["crop"], "crops need no dense features"
    assert "does not support --dense_variants plain (supported: none)" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"does not support --dense_variants plain \(supported: none\)"):
        segment_images(segmentation, embeddings, ["plain"])
    file = tmp_path / "x.npz"
    np.savez(file, images=np.eye(1, 3), image_names=["1.jpg"], texts=np.eye(1, 3), captions=["x"])
    with pytest.raises(ValueError, match="precomputed embeddings cannot be used"):
        classify_regions(data, PrecomputedEmbeddings(file, SkipLog()), ["plain"])


# ---- metrics -------------------------------------------------------------------------------------------------------


def random_predictions() -> tuple[RegionData, RegionPredictions]:
    """Return random predictions for 60 regions in 12 images, of which two have no region in the predictions."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 9, 12)
    labels = [rng.integers(0, 5, count) for count in counts]
    areas = [rng.choice([100.0, 1024.0, 5000.0, 9216.0, 50000.0], count).astype(np.float32) for count in counts]
    used = [n for n in range(12) if n not in (3, 7)]
    image = np.concatenate([np.full(counts[n], n) for n in used])
    region = np.concatenate([np.arange(counts[n]) for n in used])
    predicted = rng.integers(0, 5, len(image))
    correct = np.concatenate([labels[n] for n in used])
    rank = np.where(predicted == correct, 0, rng.integers(1, 8, len(image)))
    data = RegionData([], [], [], labels, areas, list("abcdefg"), [], {})
    return data, RegionPredictions(image, region, rank, predicted, np.zeros(len(image), np.float32))


def naive_metrics(data: RegionData, predictions: RegionPredictions, images: list[int]) -> dict[str, float]:
    """Compute the metrics with loops over the regions of the given images, which may occur several times."""
    rows = []
    for i in images:
        for n in np.flatnonzero(predictions.image == i):
            region = predictions.region[n]
            rows.append((data.labels[i][region], data.areas[i][region], predictions.rank[n], predictions.predicted[n]))
    labels, areas, ranks, predicted = (np.array(column) for column in zip(*rows, strict=True))
    sizes = {"small": areas < 1024, "medium": (areas >= 1024) & (areas < 9216), "large": areas >= 9216}
    metrics = {"top-1": np.mean(predicted == labels), "top-5": np.mean(ranks < 5)}
    metrics |= {name: np.mean(ranks[mask] == 0) if mask.any() else np.nan for name, mask in sizes.items()}
    is_class = {label: labels == label for label in np.unique(labels)}
    metrics["mean per class"] = np.mean([np.mean(predicted[mask] == label) for label, mask in is_class.items()])
    return {name: 100 * float(value) for name, value in metrics.items()}


def test_region_metrics_and_intervals_match_naive_computation() -> None:
    data, predictions = random_predictions()
    result = compute_region_metrics(data, predictions)
    metrics, intervals = result.values, result.intervals
    used = [n for n in range(12) if n not in (3, 7)]
    assert metrics == pytest.approx(naive_metrics(data, predictions, used))
    samples = []
    for weights in draw_bootstrap_counts(len(used)):
        images = [i for i, weight in zip(used, weights.tolist(), strict=True) for _ in range(int(weight))]
        samples.append(naive_metrics(data, predictions, images))
    for name, (low, high) in intervals.items():
        values = [sample[name] for sample in samples if not np.isnan(sample[name])]
        assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
        assert low < metrics[name] < high
    correct = np.concatenate([data.labels[n] for n in used])
    for label, accuracy in enumerate(compute_class_accuracy(data, predictions)):
        is_class = correct == label
        assert accuracy == (100 * float((predictions.rank[is_class] == 0).mean()) if is_class.any() else None)
    data = dataclasses.replace(data, areas=[np.full_like(areas, 100) for areas in data.areas])
    small_only = compute_region_metrics(data, predictions)
    assert list(small_only.values) == list(small_only.intervals) == ["top-1", "top-5", "small", "mean per class"]
    assert small_only.values["small"] == metrics["top-1"]


def test_differences_have_paired_intervals() -> None:
    """Recompute both models' metrics on the same resamples of the images, and take the quantiles of the differences."""
    rng = np.random.default_rng(5)
    first, second = rng.random(10), rng.random(10)

    def measure(values: np.ndarray) -> BootstrapMetrics:
        return BootstrapMetrics.from_function(
            range(10), ["mean"], lambda weights: [100 * np.average(values, weights=weights)]
        )

    models = measure(first), measure(second)
    difference = models[0].subtract(models[1])
    samples = [100 * np.average(first - second, weights=weights.numpy()) for weights in draw_bootstrap_counts(10)]
    assert difference["metrics"]["mean"] == pytest.approx(100 * (first - second).mean())
    assert difference["intervals"]["mean"] == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))
    other = dataclasses.replace(models[1], images=tuple(range(1, 11)))
    assert models[0].subtract(other) == {"metrics": difference["metrics"], "intervals": {}}, "other images"


@pytest.mark.data
def test_coco_boxes_on_real_images(real_data: Path) -> None:
    """The part of COCO val2017 has 895 objects, of which 11 are crowds."""
    data = BENCHMARKS["coco-boxes"].load(BENCHMARKS["coco-boxes"].find_folder(real_data))
    assert len(data.names) == 80 and len(data.images) <= 80
    assert sum(map(len, data.labels)) + sum(data.excluded.values()) == 895 and data.excluded["crowd"] == 11
    columns = {name: getattr(data, name)[:2] for name in ("images", "sizes", "boxes", "labels", "areas")}
    part = dataclasses.replace(data, **columns)
    predictions = classify_regions(part, colour_embeddings(), ["plain"])
    assert len(predictions["crop"].rank) == sum(map(len, part.labels))
