"""Parts of benchmarks/gpu.py, with tiny models on the CPU."""

import json
from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_search_and_plan_measure_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = import_module("gpu")
    gpu.append_row(tmp_path / "align.jsonl", {"method": "tiny, llm2clip, eager", "images/s": 123.0})
    for part in ("search", "plan"):
        gpu.run_part(part, tmp_path, tiny=True)
    gpu.write_results(tmp_path, {"search": "completed", "plan": "completed"})

    results = json.loads((tmp_path / "results.json").read_text())
    recalls = {row["method"]: row["recall@10"] for row in results["search"]["rows"]}
    assert len(recalls) == 3 and recalls["matmul and top-k on the cpu, float32"] == 1 and min(recalls.values()) > 0.9
    [plan] = results["plan"]["rows"]
    assert plan["predicted images/s"] > 0
    assert (plan["measured images/s"], plan["measured memory, GB"]) == (123, "not measured")
    assert "| tiny | h100 | 4 |" in (tmp_path / "results.md").read_text()


def test_tower_equals_that_of_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, the measured training steps could not be compared."""
    pytest.importorskip("open_clip")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = import_module("gpu_parts")
    towers = parts.align_towers(parts.PartSettings(tiny=True, out=tmp_path))
    timm_name, open_clip_name, _ = towers["tiny"]
    assert parts.measure_open_clip_difference(timm_name, open_clip_name) < 1e-5
