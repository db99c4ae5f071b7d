"""Tests of the LLM2CLIP paper's claims with small models on local data.

    python benchmarks/reproduce.py DATA --out RUN [--claims 1 4]

DATA contains flickr30k_text, flickr8k, flickr8k_text, coco_text, coco_img and ade20k_ids, each with a captions.jsonl.
Claim 2 requires Debian's package wordnet-base. The results are RUN/report.html and RUN/report.md. An interrupted run
can be resumed with the same command. The report includes the claims that earlier runs have tested.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import read_json
from llm2clip.reports import (
    BAD,
    GOOD,
    UNSURE,
    Block,
    Heading,
    Paragraph,
    Table,
    format_value_with_interval,
    write_report,
)
from llm2clip.runs.output_folder import hold_run_lock, save_or_check_config
from llm2clip.runs.ranks import load_or_compute_json
from reproduce_claims import CLAIMS, CONTRADICTED, HOLDS, INCONCLUSIVE, PARTLY_HOLDS, WEAK_SUPPORT, Claim, Comparison
from reproduce_data import ClaimData, Experiments, ReproduceConfig
from shared import make_parser

MAX_SKIPPED = 0.05  # stop if more than this fraction of the rows cannot be used
STATUSES = dict.fromkeys((PARTLY_HOLDS, WEAK_SUPPORT, INCONCLUSIVE), UNSURE) | {HOLDS: GOOD, CONTRADICTED: BAD}
COMPARISON_HEADER = ["lower", "higher", "metric", "lower (interval)", "higher (interval)", "difference", "result"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="run directory")
    parser.add_argument("--claims", nargs="+", type=int, choices=CLAIMS, default=list(CLAIMS), help="claims to test")
    args = parser.parse_args()
    with hold_run_lock(args.out):
        print(test_claims(args.data, args.out, ReproduceConfig(), args.claims))


def test_claims(data: Path, out: Path, config: ReproduceConfig, claims: Sequence[int]) -> str:
    """Test claims, write `out/report.md` and `out/report.html`, and return the text of the Markdown report."""
    save_or_check_config({"data": data, "reproduce": config}, out)
    experiments = Experiments(ClaimData(data, config, SkipLog(out / "skipped.jsonl", MAX_SKIPPED)), config, out)
    files = {number: out / "claims" / f"{number}.json" for number in CLAIMS}
    for number in claims:
        load_or_compute_json(files[number], partial(test_claim, number, experiments))
    tested = [Claim.from_dict(read_json(file)) for file in files.values() if file.exists()]
    counts = Counter(claim.verdict for claim in tested)
    verdict = ", ".join(f"{count} {name}" for name, count in counts.items())
    page = out / "report.html"
    write_report(page, "Tests of LLM2CLIP's claims", f"Claims: {verdict}.", make_report_blocks(tested, config))
    return page.with_suffix(".md").read_text(encoding="utf-8")


def test_claim(number: int, experiments: Experiments) -> dict[str, object]:
    claim = CLAIMS[number](experiments)
    print(f"claim {number}: {claim.verdict}", flush=True)
    return dataclasses.asdict(claim)


def make_report_blocks(claims: Sequence[Claim], config: ReproduceConfig) -> list[Block]:
    summary = [[claim.number, claim.title, claim.verdict] for claim in claims]
    blocks: list[Block] = [
        Paragraph(
            "Each claim of the paper (arXiv 2411.04997) is tested with the paper's method, scaled down to this machine "
            "by using small models and few images."
        ),
        Table(["number", "claim", "result"], summary, statuses=STATUSES),
        Paragraph(
            f"The vision tower ({config.tower}, {config.image_size} pixels) is frozen; the heads are trained for "
            f"{config.epochs:g} epochs. Values are means over {config.seeds} seeds, with 95% confidence intervals "
            "computed by bootstrapping over test images and seeds."
        ),
        Paragraph(
            f"A comparison {HOLDS} if the first value's interval lies entirely below the second value's. It has "
            f"{WEAK_SUPPORT} if only the interval of the difference, paired by image, is above zero. It is "
            f"{CONTRADICTED} if the interval of the difference is below zero, and {INCONCLUSIVE} otherwise. A claim "
            f"{PARTLY_HOLDS} if some but not all of its comparisons hold."
        ),
    ]
    for claim in claims:
        comparisons = [format_comparison(comparison) for comparison in claim.comparisons]
        blocks += [
            Heading(f"{claim.number}. {claim.title}"),
            Paragraph(claim.verdict, STATUSES[claim.verdict]),
            Table(claim.header, claim.rows),
            Table(COMPARISON_HEADER, comparisons, statuses=STATUSES),
            *map(Paragraph, claim.notes),
        ]
    return blocks


def format_comparison(comparison: Comparison) -> list[str]:
    number_format = ".3f" if comparison.metric == "seconds" else ".1f"
    intervals = (comparison.low_interval, comparison.high_interval, comparison.difference)
    formatted = [format_value_with_interval(value, limits, number_format) for value, *limits in intervals]
    return [comparison.low, comparison.high, comparison.metric, *formatted, comparison.verdict]


if __name__ == "__main__":
    main()
