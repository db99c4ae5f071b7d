"""Open-vocabulary detection: average precision, names of boxes, proposals, and the OV-COCO benchmark."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from dense_fixtures import coco_json, colour_embeddings, colour_model, draw_rectangles, make_coco
from llm2clip.cli import main
from llm2clip.config import EvaluateOptions
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.evaluate.benchmarks import BENCHMARKS, get_benchmarks
from llm2clip.evaluate.benchmarks.base import DetectionData
from llm2clip.evaluate.benchmarks.coco_instances import load_ov_coco_classes
from llm2clip.evaluate.detection import (
    DetectionResults,
    Detections,
    build_detection_section,
    classify_boxes,
    compute_detection_metrics,
    detect_objects,
    exclude_images,
)
from llm2clip.evaluate.proposals import Proposals, get_object_boxes, open_proposal_source
from llm2clip.evaluate.regions import encode_boxes
from llm2clip.evaluate.runner import evaluate_models
from llm2clip.io_utils import DataFormatError, MissingFileError
from llm2clip.reports import ReportImageGroup

NAMES = ("red", "green", "blue")
GROUPS = {"novel": ("red", "green"), "base": ("blue",)}


def make_data(
    objects: list[tuple[int, str, list[float]]], num_images: int, crowds: tuple[int, ...] = ()
) -> DetectionData:
    """Create detection data from (image index, class name, [x, y, w, h]). `crowds` are indices of crowds."""
    annotations = []
    for n, (image, name, box) in enumerate(objects):
        row = {"id": n, "image_id": 10 + image, "category_id": 100 + NAMES.index(name), "bbox": box}
        annotations.append({**row, "area": box[2] * box[3], "iscrowd": int(n in crowds)})
    return DetectionData(
        images=[FileImage(f"{n}.jpg") for n in range(num_images)],
        image_ids=[10 + n for n in range(num_images)],
        sizes=[(120, 90)] * num_images,
        annotations=annotations,
        names=NAMES,
        category_ids=[100, 101, 102],
        groups=GROUPS,
        templates=["a {}"],
    )


def make_detections(rows: list[tuple[str, list[float], float]]) -> Detections:
    """Create the detections in one image from (class name, [x, y, w, h], score)."""
    boxes = torch.tensor([[x, y, x + w, y + h] for _, (x, y, w, h), _ in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([score for _, _, score in rows])
    return Detections(boxes, scores, torch.tensor([NAMES.index(name) for name, _, _ in rows], dtype=torch.int64))


def random_case(seed: int, num_images: int = 12) -> tuple[DetectionData, dict[int, Detections]]:
    """Create random objects, and detections that are shifted copies of objects or random boxes. Scores are distinct."""
    random = np.random.default_rng(seed)
    objects, detections, scores = [], {}, iter(random.permutation(1000) / 1000)
    for image in range(num_images):
        rows = []
        for _ in range(random.integers(0, 5)):
            box = [*random.uniform(0, 60, 2), *random.uniform(10, 40, 2)]
            name = NAMES[random.integers(3)]
            objects.append((image, name, box))
            for _ in range(random.integers(0, 3)):
                shifted = [value + random.uniform(-4, 4) for value in box]
                rows.append((name if random.random() < 0.8 else NAMES[random.integers(3)], shifted, next(scores)))
        rows.append((NAMES[random.integers(3)], [*random.uniform(0, 60, 2), 20, 20], next(scores)))
        detections[10 + image] = make_detections(rows)
    return make_data(objects, num_images), detections


# ---- average precision ----------------------------------------------------------------------------------------------


def test_average_precision_of_a_case_computed_by_hand() -> None:
    box, other = [0, 0, 10, 10], [50, 50, 10, 10]
    data = make_data([(0, "red", box), (1, "red", box), (0, "blue", other)], num_images=2)
    detections = {
        10: make_detections([("red", box, 0.9), ("red", other, 0.8), ("blue", [50, 50, 10, 7], 0.5)]),
        11: make_detections([("red", box, 0.7)]),
    }
    result, class_ap50 = compute_detection_metrics(data, detections)
    metrics, intervals = result.values, result.intervals
    # red: hit, miss, hit. The precision is 1 up to a recall of 0.5 (51 of 101 values), and 2/3 above.
    red = 100 * (51 + 50 * 2 / 3) / 101
    assert metrics["AP50 novel"] == pytest.approx(red)  # there are no green objects
    assert metrics["AP50 base"] == pytest.approx(100)
    assert metrics["AP base"] == pytest.approx(50)  # the IoU is 0.7: correct at 5 of the 10 thresholds
    assert metrics["AP50 all"] == pytest.approx((red + 100) / 2)  # the mean over classes, not over groups
    # If either image is drawn twice, the misses come last, and AP50 is 100. Otherwise, it is as above.
    assert intervals["AP50 novel"] == pytest.approx((red, 100))
    assert class_ap50 == pytest.approx({"red": red, "blue": 100})
    assert len(result.resamples["AP50 novel"]) == 1000


def test_detections_on_crowds_are_ignored_and_no_detections_score_zero() -> None:
    box, crowd = [0, 0, 10, 10], [40, 40, 30, 30]
    data = make_data([(0, "red", box), (0, "red", crowd)], num_images=1, crowds=(1,))
    on_crowd = ("red", [45, 45, 5, 5], 0.9)
    metrics, _ = compute_detection_metrics(data, {10: make_detections([on_crowd, ("red", box, 0.5)])}, resamples=5)
    assert metrics.values["AP50 novel"] == pytest.approx(100)
    assert metrics.intervals["AP50 novel"] == pytest.approx((2.5, 100))  # Clopper and Pearson, 1 of 1 image
    nothing, _ = compute_detection_metrics(data, {}, resamples=5)
    assert nothing.values["AP50 novel"] == 0 and nothing.intervals["AP50 novel"] == pytest.approx((0, 97.5))


def test_resamples_equal_average_precision_with_repeated_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The intervals must be those of COCOeval on resampled images, where an image can occur several times."""
    data, detections = random_case(1, num_images=6)
    counts = [2, 0, 1, 3, 1, 0]
    with monkeypatch.context() as patch:
        patch.setattr("llm2clip.evaluate.detection.draw_bootstrap_counts", lambda *_: [torch.tensor(counts).double()])
        resampled = compute_detection_metrics(data, detections)[0].resamples
    sources = [image for image, count in enumerate(counts) for _ in range(count)]
    objects, repeated = [], {}
    for copy, image in enumerate(sources):
        for row in data.annotations:
            if row["image_id"] == 10 + image:
                objects.append((copy, NAMES[data.category_ids.index(row["category_id"])], row["bbox"]))
        repeated[10 + copy] = detections[10 + image]
    expected = compute_detection_metrics(make_data(objects, len(sources)), repeated, resamples=1)[0].values
    assert {name: values.tolist() for name, values in resampled.items()} == {
        name: pytest.approx([expected[name]]) for name in ("AP50 novel", "AP50 base", "AP50 all")
    }


# ---- names of boxes -------------------------------------------------------------------------------------------------


def unit(*shape: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_classify_boxes_scores_are_geometric_means() -> None:
    corners = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40], [60, 0, 80, 30]])
    objectness = torch.tensor([0.9, 0.2, 0.5])
    boxes, classes = unit(3, 8, seed=0) * 0.05 + unit(1, 8, seed=1), unit(4, 8, seed=2)
    boxes = torch.nn.functional.normalize(boxes, dim=-1)
    detected = classify_boxes(Proposals(corners, objectness), boxes, classes)
    assert len(detected.scores) == 12  # each pair of a box and a class, because the boxes do not overlap
    assert detected.scores.tolist() == sorted(detected.scores.tolist(), reverse=True)
    logits = 100 * boxes.double().numpy() @ classes.double().numpy().T
    for box, score, label in zip(detected.boxes, detected.scores, detected.labels, strict=True):
        n = int((corners == box).all(1).nonzero())
        exponentials = np.exp(logits[n] - logits[n].max())
        probability = exponentials[label] / exponentials.sum()
        assert float(score) == pytest.approx(np.sqrt(float(objectness[n]) * probability), rel=1e-4)


def test_classify_boxes_orders_scores_that_float32_would_round_to_1() -> None:
    """With CLIP's logit scale, probabilities such as 1 - 2e-9 are common. Equal scores keep the order of the boxes."""
    cosines = torch.tensor([0.18, 0.20, 0.22, 0.19], dtype=torch.float64)  # minus the cosine of the other class
    classes = torch.eye(2, 4)
    embeddings = torch.zeros(len(cosines), 4, dtype=torch.float64)
    embeddings[:, 0] = cosines
    corners = torch.tensor([[20.0 * n, 0, 20 * n + 10, 10] for n in range(len(cosines))])
    detected = classify_boxes(Proposals(corners, torch.ones(len(cosines))), embeddings, classes)
    confident = detected.labels == 0
    assert detected.boxes[confident][:, 0].tolist() == [40, 20, 60, 0]  # by decreasing cosine
    expected = np.sqrt(1 / (1 + np.exp(-100 * cosines.numpy())))
    assert detected.scores[confident].tolist() == pytest.approx(np.sort(expected)[::-1], abs=1e-15, rel=0)
    assert len(set(detected.scores[confident].tolist())) == 4

    assert len(classify_boxes(Proposals(torch.zeros(0, 4), torch.zeros(0)), torch.zeros(0, 4), classes).scores) == 0
    many = 1200  # more than the limit of 1,000 candidates
    corners = torch.tensor([[20.0 * n, 0, 20 * n + 10, 10] for n in range(many)])
    detected = classify_boxes(Proposals(corners, torch.ones(many)), classes[:1].expand(many, 4), classes[:1])
    assert detected.boxes[:, 0].tolist() == [20.0 * n for n in range(100)]


def test_classify_boxes_suppresses_overlapping_boxes_of_the_same_class_only() -> None:
    classes = torch.eye(2, 4)
    corners = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8]])
    embeddings = classes[[0, 0, 1]]  # two boxes of class 0 and one of class 1
    detected = classify_boxes(Proposals(corners, torch.tensor([0.5, 0.9, 0.4])), embeddings, classes)
    confident = detected.scores > 0.1
    assert detected.labels[confident].tolist() == [0, 1]
    assert detected.boxes[confident].tolist() == corners[1:].tolist()


# ---- proposals ------------------------------------------------------------------------------------------------------

DATA = make_data([(0, "red", [1, 2, 3, 4]), (0, "green", [5, 5, 2, 2]), (1, "blue", [0, 0, 8, 8])], 2, crowds=(1,))
IMAGE = torch.zeros(3, 20, 30, dtype=torch.uint8)
CPU = torch.device("cpu")


def write_proposals(folder: Path, rows: Any) -> str:
    file = folder / "proposals.json"
    file.write_text(json.dumps(rows))
    return str(file)


def test_proposals_are_read_from_files_and_annotations(tmp_path: Path) -> None:
    rows = [
        {"image_id": 10, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.25},
        {"image_id": 99, "bbox": [1, 2, 3, 4], "score": 0.5},
        {"image_id": "10", "bbox": [0, 0, 5, 6], "score": 0.75},
        {"image_id": 10.0, "bbox": [2, 2, 2, 2], "score": 0.5},
    ]
    find, note = open_proposal_source(write_proposals(tmp_path, rows), DATA, CPU)
    proposals = find(10, IMAGE)
    assert proposals.boxes.tolist() == [[1, 2, 4, 6], [0, 0, 5, 6], [2, 2, 4, 4]]
    assert proposals.scores.tolist() == [0.25, 0.75, 0.5]
    assert len(find(11, IMAGE).boxes) == 0
    assert "1 of 4 boxes refer to images that are not in the benchmark" in note
    assert "1 of 2 images have no boxes" in note
    ground_truth, _ = open_proposal_source("ground-truth", DATA, CPU)
    assert ground_truth(10, IMAGE).boxes.tolist() == [[1, 2, 4, 6]], "crowds are omitted"
    assert ground_truth(11, IMAGE).scores.tolist() == [1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image_id": 10, "score": 0.5}, "'bbox'"),
        ({"image_id": 10, "bbox": [1, 2, 3, 4]}, "'score'"),
        ({"image_id": [10], "bbox": [1, 2, 3, 4], "score": 0.5}, r"\[10\] must be an integer or a string"),
        ({"image_id": 10, "bbox": [1, 2, 3], "score": 0.5}, r"\[1, 2, 3\]"),
        ({"image_id": 10, "bbox": [1, 2, -3, 4], "score": 0.5}, r"\[1, 2, -3, 4\]"),
        ({"image_id": 10, "bbox": [1, 2, float("nan"), 4], "score": 0.5}, "in pixels"),
        ({"image_id": 10, "bbox": [-1e300, 0, 1e300, 5], "score": 0.5}, "in pixels"),
        ({"image_id": 10, "bbox": [10**400, 0, 1, 1], "score": 0.5}, "OverflowError"),
        ({"image_id": math.inf, "bbox": [0, 0, 1, 1], "score": 0.5}, "image_id inf"),
        ({"image_id": 10, "bbox": [1, 2, 3, 4], "score": 3.5}, r"between 0 and 1 \(got 3\.5\)\. Apply a sigmoid"),
        ("text", "text"),
    ],
)
def test_proposal_file_with_a_malformed_row_is_rejected(tmp_path: Path, row: Any, message: str) -> None:
    good = {"image_id": 10, "bbox": [1, 2, 3, 4], "score": 0.5}
    with pytest.raises(DataFormatError, match=f"proposals.json, row 2: .*{message}"):
        open_proposal_source(write_proposals(tmp_path, [good, row]), DATA, CPU)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gone.json", MissingFileError, r"gone\.json does not exist"),
        ("dict.json", DataFormatError, r"dict\.json must be a list"),
        ("ids.json", DataFormatError, r"ids\.json contains no boxes for .* check the image_id values"),
        ("nothing", ValueError, "cannot load a transformers object detection model"),
    ],
)
def test_invalid_sources_of_proposals_are_rejected(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dict.json").write_text('{"annotations": []}')
    Path("ids.json").write_text('[{"image_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}]')
    Path("nothing").mkdir()
    with pytest.raises(error, match=message):
        open_proposal_source(name, DATA, CPU)


def test_top_proposals_are_clipped_sorted_and_limited() -> None:
    boxes = torch.tensor([[-5.0, 1, 10, 50], [3, 3, 3, 9], [40, 2, 50, 9], [1, 1, 9, 9]])
    top = Proposals(boxes, torch.tensor([0.1, 0.9, 0.8, 0.7])).select_top_proposals(20, 30)
    assert top.boxes.tolist() == [[1, 1, 9, 9], [0, 1, 10, 20]]  # the empty box and the box outside are gone
    assert top.scores.tolist() == pytest.approx([0.7, 0.1])
    many = torch.tensor([[0.0, 0, 1 + n / 100, 5] for n in range(400)])
    assert len(Proposals(many, torch.rand(400)).select_top_proposals(20, 30).boxes) == 300


def test_transformers_detector_returns_its_boxes(tmp_path: Path) -> None:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    torch.manual_seed(0)
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 48],
        patch_size=16, num_detection_tokens=5, num_labels=3,
    )  # fmt: skip
    model = YolosForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 48}, do_pad=False).save_pretrained(tmp_path)
    image = torch.randint(0, 256, (3, 60, 80), dtype=torch.uint8)
    detect, _ = open_proposal_source(str(tmp_path), DATA, CPU)
    found = detect(10, image)
    pixels = YolosImageProcessor.from_pretrained(tmp_path)(images=image, return_tensors="pt")
    outputs = model(**pixels)
    centre_x, centre_y, width, height = (outputs.pred_boxes[0] * torch.tensor([80, 60, 80, 60])).unbind(-1)
    corners = torch.stack([centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2], 1)
    assert torch.allclose(found.boxes, corners, atol=1e-4)
    assert torch.allclose(found.scores, outputs.logits[0].softmax(-1)[:, :-1].amax(-1))


# ---- OV-COCO --------------------------------------------------------------------------------------------------------


def test_class_split_has_48_base_and_17_novel_classes_of_coco() -> None:
    split = load_ov_coco_classes()
    coco_names = {name for name in FasterRCNN_ResNet50_FPN_Weights.DEFAULT.meta["categories"] if name != "N/A"}
    names = list(itertools.chain(*split.values()))
    assert {group: len(classes) for group, classes in split.items()} == {"novel": 17, "base": 48}
    assert len(set(names)) == 65 and set(names) < coco_names


def ov_coco_file(folder: Path, image_id: int | str = 10, **changes: Any) -> Path:
    """Write a folder of OV-COCO with one image, which shows a cat, and change the annotation."""
    names = list(itertools.chain(*load_ov_coco_classes().values()))
    row = {"image_id": image_id, "category_id": 2 * names.index("cat") + 1, "bbox": [4, 4, 20, 20], **changes}
    content = coco_json([("0.png", (64, 48))], [row], names)
    content["images"][0]["id"] = image_id
    draw_rectangles(folder / "val2017/0.png", (64, 48), [("red", [4, 4, 20, 20])])
    file = folder / "annotations/instances_val2017.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def test_boxes_are_clipped_to_the_image_and_image_ids_can_be_strings(tmp_path: Path) -> None:
    ov_coco_file(tmp_path, "one", bbox=[-30, 40, 94.5, 30])  # the part inside is 64 x 8 pixels
    data = BENCHMARKS["ov-coco"].load(tmp_path)
    assert data.annotations[0]["bbox"] == [0, 40, 64, 8]
    results = detect_objects(data, colour_embeddings(), "ground-truth", ["plain"])
    assert set(results.by_method["plain"]) == {"one"}
    assert (results.num_objects, results.num_covered) == (1, 1), "the true boxes cover all objects"
    assert list(compute_detection_metrics(data, results.by_method["plain"], resamples=2)[1]) == ["cat"]
    file = write_proposals(tmp_path, [{"image_id": "one", "bbox": [0, 40, 64, 8], "score": 0.5}])
    assert detect_objects(data, colour_embeddings(), file, ["plain"]).num_covered == 1


def test_ov_coco_rejects_files_without_objects_categories_or_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(error: type[Exception], message: str, **changes: Any) -> None:
        ov_coco_file(tmp_path, **changes)
        with pytest.raises(error, match=message):
            BENCHMARKS["ov-coco"].load(tmp_path)

    load(DataFormatError, "val2017.json contains only crowds, so average precision is undefined", iscrowd=1)
    load(DataFormatError, "contains no objects of the selected classes", bbox=[70, 4, 20, 20])
    ov_coco_file(tmp_path)
    (tmp_path / "val2017/0.png").unlink()
    with pytest.raises(MissingFileError, match="1 of 1 images"):
        BENCHMARKS["ov-coco"].load(tmp_path)
    file = make_coco(tmp_path)
    with pytest.raises(DataFormatError, match=f"{file.name}: 65 of the 65 OV-COCO categories .*, e.g. 'airplane'"):
        BENCHMARKS["ov-coco"].load(tmp_path)
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(MissingFileError, match=r"pip install 'llm2clip\[dense\]'"):
        BENCHMARKS["ov-coco"].load(tmp_path)
    only_crowds = make_data([(0, "red", [1, 2, 3, 4])], 1, crowds=(0,))
    with pytest.raises(ValueError, match="the images contain no objects except crowds"):
        compute_detection_metrics(only_crowds, {}, resamples=2)


def test_the_users_coco_file_is_read_with_all_images(tmp_path: Path) -> None:
    file = ov_coco_file(tmp_path)
    content = json.loads(file.read_text())
    draw_rectangles(tmp_path / "val2017/empty.png", (64, 48), [])
    content["images"].append({"id": 11, "file_name": "empty.png", "width": 64, "height": 48})
    content["categories"] = content["categories"][:20]
    content["categories"][0]["name"] = "red_cat"
    file.write_text(json.dumps(content))
    [benchmark] = get_benchmarks([f"detection:{file}"], ["a {}"])
    data = benchmark.load(benchmark.find_folder(Path("unused")))
    assert (benchmark.kind, data.image_ids, data.templates) == ("detection", [10, 11], ["a {}"])
    assert len(data.names) == 20 and data.names[0] == "red cat" and data.category_ids[:2] == [1, 3]
    detections = {10: Detections(torch.tensor([[4.0, 4, 24, 24]]), torch.ones(1).double(), torch.tensor([5]))}
    metrics, _ = compute_detection_metrics(data, detections, resamples=2)
    assert list(metrics.values) == ["AP50 all", "AP all"]


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_that_of_pycocotools(seed: int) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    data, detections = random_case(seed)
    rows = []
    for image_id, detected in detections.items():
        for (left, top, right, bottom), score, label in zip(*vars(detected).values(), strict=True):
            box = [float(value) for value in (left, top, right - left, bottom - top)]
            rows.append({"image_id": image_id, "category_id": 100 + int(label), "bbox": box, "score": float(score)})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": image_id} for image_id in data.image_ids],
        "annotations": [{**row, "id": row["id"] + 1} for row in data.annotations],
        "categories": [{"id": category_id} for category_id in data.category_ids],
        "info": {},
    }
    truth.createIndex()
    evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    precision = 100 * evaluator.eval["precision"][..., 0, 2]  # (thresholds, recalls, classes); at most 100 detections
    metrics = compute_detection_metrics(data, detections, resamples=2)[0].values
    expected = {"AP all": precision, "AP50 all": precision[0], "AP50 novel": precision[0, :, :2]}
    expected |= {"AP50 base": precision[0, :, 2], "AP novel": precision[..., :2], "AP base": precision[..., 2]}
    assert metrics == pytest.approx({name: values.mean() for name, values in expected.items()})


def test_results_of_finished_benchmarks_are_saved_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise IndexError("a bug")

    ov_coco_file(tmp_path / "coco")
    monkeypatch.setattr("llm2clip.evaluate.embeddings.open_dual_encoder", lambda *args, **kwargs: colour_model())
    monkeypatch.setattr("llm2clip.evaluate.embeddings.fingerprint", lambda identity: "0" * 64)
    monkeypatch.setattr("llm2clip.evaluate.detection.detect_objects", fail)
    options = EvaluateOptions(
        benchmarks=["coco-boxes", "ov-coco"],
        root=str(tmp_path),
        out=str(tmp_path / "out"),
        proposals="ground-truth",
    )
    with pytest.raises(IndexError, match="a bug"):
        evaluate_models(["colours"], [], options)
    [result] = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert result["benchmark"] == "coco-boxes"


# ---- detection with a model that recognises colours -----------------------------------------------------------------


RECTANGLES = [("red", "green"), ("green", "blue"), ("blue", "red"), ("green", "red")]  # of each image


def draw_data(folder: Path) -> DetectionData:
    """Draw two coloured rectangles on each of four images, and return the rectangles as objects."""
    objects = []
    for n, (first, second) in enumerate(RECTANGLES):
        drawn = [(first, [5.0 + n, 8, 30 + n, 25]), (second, [70.0, 40 + n, 30 + n, 25])]
        draw_rectangles(folder / f"{n}.png", (120, 90), drawn)
        objects += [(n, name, box) for name, box in drawn]
    data = make_data(objects, num_images=4)
    return dataclasses.replace(data, images=[FileImage(str(folder / f"{n}.png")) for n in range(4)])


def detect(data: DetectionData, proposals: str = "ground-truth") -> DetectionResults:
    return detect_objects(data, colour_embeddings(), proposals, ["plain", "sclip"], with_crops=True)


def test_proposal_recall_counts_the_objects_that_a_proposal_covers(tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    first, second = data.annotations[0]["bbox"], data.annotations[1]["bbox"]
    half = [second[0], second[1], second[2], 12]  # of 25 pixels
    rows = [{"image_id": 10, "bbox": box, "score": 0.5} for box in (first, first, half)]
    results = detect(data, write_proposals(tmp_path, rows))
    assert (results.num_proposals, results.num_covered, results.num_objects) == (3, 1, 8)
    assert "3 of 4 images have no boxes" in results.note


def test_unusable_images_are_recorded(tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    (tmp_path / "2.png").write_bytes(b"no image")
    Image.new("RGB", (60, 45)).save(tmp_path / "3.png")
    embeddings = colour_embeddings(max_skipped=0.5)
    results = detect_objects(data, embeddings, "ground-truth", ["plain"])
    assert set(results.by_method["plain"]) == {10, 11} and results.num_objects == 4
    remaining = exclude_images(data, results.failures)
    assert remaining.image_ids == [10, 11] and remaining.images == data.images[:2] and len(remaining.sizes) == 2
    assert [row["image_id"] for row in remaining.annotations] == [10, 10, 11, 11]
    assert embeddings.log.skipped == {"unusable image": 2}


def test_learned_logit_scale_is_evaluated_next_to_the_scale_of_the_protocol(tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    embeddings = colour_embeddings()
    embeddings.model.logit_scale = lambda: 3.0
    results = detect_objects(data, embeddings, "ground-truth", ["plain"])
    assert results.logit_scales == {"plain": 100, "plain, learned scale": 3}
    boxes = get_object_boxes(data)[10]
    [embedded] = encode_boxes(embeddings.model, [load_image(data.images[0])], [boxes], "plain")
    classes = torch.nn.functional.normalize(torch.eye(3) + 0.01, dim=-1)
    for method, scale in results.logit_scales.items():
        expected = classify_boxes(Proposals(boxes, torch.ones(2)), embedded, classes, scale)
        torch.testing.assert_close(results.by_method[method][10].scores, expected.scores)


def test_detection_blocks_show_the_names(tmp_path: Path) -> None:
    data = draw_data(tmp_path)
    results = detect(data)
    blocks = build_detection_section(data, "plain", results.by_method["plain"], count=2)
    [images] = [block for block in blocks if isinstance(block, ReportImageGroup)]
    assert len(images.images) == 2
    assert images.images[0].caption in ("red 1.00, green 1.00", "green 1.00, red 1.00")  # one name per box
    assert load_image(images.images[0].jpeg).shape == (3, 360, 480)


def test_evaluate_command_reports_detection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [*(name for group in load_ov_coco_classes().values() for name in group), "stop sign"]
    colours = {"cat": "red", "dog": "green", "person": "blue"}
    boxes = {"cat": [4, 4, 24, 16], "person": [36, 20, 20, 24], "dog": [2, 25, 20, 20], "stop sign": [40, 0, 20, 15]}
    rows = []
    for image, image_names in enumerate([("cat", "person"), ("dog", "person"), ("stop sign",)]):
        rectangles = [(colours[name], boxes[name]) for name in image_names if name in colours]
        draw_rectangles(tmp_path / f"coco/val2017/{image}.png", (64, 48), rectangles)
        for name in image_names:
            category_id = 2 * names.index(name) + 1
            rows.append({"image_id": 10 + image, "category_id": category_id, "bbox": boxes[name]})
    images = [(f"{n}.png", (64, 48)) for n in range(3)]
    file = tmp_path / "coco/annotations/instances_val2017.json"
    file.parent.mkdir()
    file.write_text(json.dumps(coco_json(images, rows, names)))
    model = colour_model()
    encode = model.encode_texts_raw
    model.encode_texts_raw = lambda texts, progress: encode(
        [" ".join(colours.get(word.strip(".,!"), word) for word in text.split()) for text in texts], progress
    )
    monkeypatch.setattr("llm2clip.evaluate.embeddings.open_dual_encoder", lambda *args, **kwargs: model)
    monkeypatch.setattr("llm2clip.evaluate.embeddings.fingerprint", lambda identity: "0" * 64)
    (tmp_path / "colours").mkdir()  # the name of the model must be a path or a hub id
    monkeypatch.chdir(tmp_path)
    folders = ["--root", str(tmp_path), "--out", str(tmp_path / "out")]
    command = ["evaluate", "colours", "--benchmarks", "ov-coco", *folders]
    assert main([*command, "--proposals", "ground-truth", "--crop_proposals"]) == 0
    output = capsys.readouterr().out
    assert "| paper 2026: EVA02 + LLM2CLIP | – | – | – | 28.9 | 54.7 | 48.0 |" in output
    [result] = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert result["images"] == 2  # the third image has only objects of classes that are not used
    assert [row["method"] for row in result["rows"]] == ["plain", "crop"]
    metrics = result["rows"][0]["metrics"]
    for name in ("AP50 novel", "AP50 base", "AP50 all", "AP all"):
        assert metrics[name] == pytest.approx(100)
    assert result["proposals"]["boxes"] == 4 and metrics["proposal recall"] == 100
    assert result["rows"][0]["class AP50"] == pytest.approx({"cat": 100, "dog": 100, "person": 100})
    page = (tmp_path / "out/report.html").read_text()
    assert "<summary>AP50 per class, %</summary>" in page and "  100.0  100.0  dog\n" in page
    assert "cat 1.00" in page and "Proposals from ground-truth: 4 boxes" in page
    assert "| colours (upper bound) | plain | 100.0 |" in output
    assert "ov-coco: Proposals from ground-truth: 4 boxes" in output and "The AP is an upper bound" in output
    assert main(command) == 1
    assert "pass --proposals" in capsys.readouterr().err
    own = ["evaluate", "colours", "--benchmarks", f"boxes:{file}", "--templates", "a {}!", "--out"]
    assert main([*own, str(tmp_path / "own")]) == 0
    assert "3 images, 5 boxes" in capsys.readouterr().out
    [result] = json.loads((tmp_path / "own/results.json").read_text())["results"]
    assert result["texts"] == len(names), "one template"
    assert main([*command, "--templates", "a {}"]) == 1
    assert "--templates applies only to short queries and to your own images" in capsys.readouterr().err
