"""Dense evaluation in two processes. One run for all kinds of benchmarks, because starting the processes takes long."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from conftest import run_distributed
from dense_fixtures import colour_embeddings, make_coco, make_segmentation
from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.dense.detection import DetectionResults
from llm2clip.evaluate.dense.regions import RegionPredictions, classify_regions
from llm2clip.evaluate.dense.segmentation import SegmentationResult, evaluate_segmentation
from llm2clip.runs.ranks import process_state, shutdown
from test_detection import detect, draw_data, make_drawn_data


def evaluate(folder: Path) -> tuple[SegmentationResult, RegionPredictions, DetectionResults]:
    """Evaluate generated images with labels, `folder/coco`, and the images of `draw_data` in `folder`."""
    data = make_segmentation(folder / f"images{process_state().process_index}")
    segmentation = evaluate_segmentation(data, colour_embeddings(), ["plain"])
    regions = classify_regions(BENCHMARKS["coco-boxes"].load(folder / "coco"), colour_embeddings(), ["plain"])["plain"]
    return segmentation, regions, detect(make_drawn_data(folder))


def evaluate_on_rank(folder: Path) -> None:
    torch.save(evaluate(folder), folder / f"{process_state().process_index}.pt")
    shutdown()


def test_ranks_share_the_images_and_return_the_results_of_one_process(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco")
    draw_data(tmp_path)
    expected_segmentation, expected_regions, expected_detections = evaluate(tmp_path)
    run_distributed(2, evaluate_on_rank, tmp_path)
    for rank in (0, 1):
        segmentation, regions, detections = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert segmentation.images == [0, 1, 2] and set(segmentation.examples) == {0, 1, 2}
        assert np.array_equal(segmentation.counts["plain"], expected_segmentation.counts["plain"])
        assert regions.image.tolist() == [0, 0, 1, 1, 2]
        assert regions.predicted.tolist() == expected_regions.predicted.tolist() == [0, 2, 1, 0, 2]
        assert (detections.num_boxes, detections.num_covered, detections.num_objects) == (8, 8, 8)
        assert set(detections.by_method) == {"plain", "sclip", "crop"}
        for method, by_image in expected_detections.by_method.items():
            assert set(detections.by_method[method]) == set(by_image)
            for image_id, detected in by_image.items():
                assert torch.equal(detections.by_method[method][image_id].scores, detected.scores)
