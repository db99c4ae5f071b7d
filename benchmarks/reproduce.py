"""Tests of the LLM2CLIP paper's claims with small models on local data.

    python benchmarks/reproduce.py DATA --out RUN [--claims 1 4] [--steps 60 ...]

DATA contains flickr30k_text, flickr8k, flickr8k_text, coco_text, coco_img and ade20k_ids, each with a captions.jsonl.
Other sources are set with --tune, --train, --test and so on; see --help. The results are RUN/report.html and
RUN/report.md. The report shows the paper's own results next to the measured ones; they come from the module
`published_results`, which contains the values from the 2026 (AAAI-26) and 2024 project pages.
"""

import dataclasses
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from figures import plot_intervals
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate import plots
from llm2clip.io_utils import read_json
from llm2clip.published_results import CRA, CRA_NOTE, TABLES, PublishedTable
from llm2clip.reports import (
    BAD,
    GOOD,
    UNSURE,
    Block,
    Code,
    Figure,
    Heading,
    Paragraph,
    Table,
    format_with_interval,
    write_report,
)
from llm2clip.runs.output_folder import run_lock, save_or_check_config
from llm2clip.runs.ranks import load_or_compute_json
from reproduce_claims import (
    CLAIMS,
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    NOT_TESTED,
    PARTLY_HOLDS,
    WEAK_SUPPORT,
    Claim,
)
from reproduce_data import ClaimData, Experiments, ReproduceConfig

MAX_SKIPPED = 0.05  # stop if more than this fraction of the rows cannot be used
STATUSES = dict.fromkeys((PARTLY_HOLDS, WEAK_SUPPORT, INCONCLUSIVE, NOT_TESTED), UNSURE)
STATUSES |= {HOLDS: GOOD, CONTRADICTED: BAD}


def main(args: Sequence[str] | None = None) -> None:
    """Read the command line, test the claims and write the report."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # use field docstrings as help texts
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="Folder to which the paths of sources are relative.")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="Run directory.")
    parser.add_argument("--claims", nargs="+", type=int, default=list(CLAIMS), help="Numbers of the claims to test.")
    parser.add_class_arguments(ReproduceConfig)
    options = parser.parse_args(args)
    config = ReproduceConfig(**{field.name: options[field.name] for field in dataclasses.fields(ReproduceConfig)})
    unknown = [number for number in options.claims if number not in CLAIMS]
    if unknown:
        raise SystemExit(f"unknown claim {unknown[0]}: available claims are {', '.join(map(str, CLAIMS))}")
    with run_lock(options.out):
        page = test_claims(options.data, options.out, config, options.claims)
    print(f"Report: {page}")


def test_claims(data: Path, out: Path, config: ReproduceConfig, claims: Sequence[int]) -> Path:
    """Test claims, write `out/report.md` and `out/report.html`, and return the path of the HTML report.

    Interrupted runs can be resumed. The report also includes claims tested by earlier runs in `out`.

    Args:
        claims: Numbers of the claims to test, from 1 to 6.

    Raises:
        ValueError: No claim could be tested.
    """
    save_or_check_config({"data": data, "reproduce": config}, out)
    log = SkipLog(out / "skipped.jsonl", MAX_SKIPPED)
    experiments = Experiments(ClaimData(data, config, log), config, out)

    files = {number: out / "claims" / f"{number}.json" for number in CLAIMS}
    untested = []
    for number in claims:
        start = time.time()
        try:
            claim = Claim.from_dict(load_or_compute_json(files[number], partial(_test_claim, number, experiments)))
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"claim {number}: {NOT_TESTED} ({error})")
            untested.append(Claim(number, notes=[str(error)]))
            continue
        print(f"claim {number}: {claim.verdict} ({(time.time() - start) / 60:.0f} minutes)")

    tested = [Claim.from_dict(read_json(file)) for file in files.values() if file.exists()]
    if not tested:
        reasons = "; ".join(f"{claim.number}: {claim.notes[0]}" for claim in untested)
        raise ValueError(f"no claim could be tested: {reasons}")
    reported = sorted([*tested, *untested], key=lambda claim: claim.number)
    blocks = make_report_blocks(reported, config, shlex.join(["python", *sys.argv]))
    counts = Counter(claim.verdict for claim in reported)
    verdict = ", ".join(f"{count} {name}" for name, count in counts.items())
    page = out / "report.html"
    write_report(page, "Tests of LLM2CLIP's claims", f"Claims: {verdict}.", blocks)
    print(page.with_suffix(".md").read_text(encoding="utf-8"), log.summary(), sep="\n")
    return page


def _test_claim(number: int, experiments: Experiments) -> dict[str, object]:
    return dataclasses.asdict(CLAIMS[number](experiments))


# ---- report ----------------------------------------------------------------------------------------------------------


def make_report_blocks(claims: Sequence[Claim], config: ReproduceConfig, command: str) -> list[Block]:
    """Return the blocks of the report. `command` is the shell command that reproduces the report."""
    summary = [[claim.number, claim.title, claim.verdict] for claim in claims]
    blocks: list[Block] = [
        Paragraph(
            "Each claim of the paper (arXiv 2411.04997) is tested with the paper's method, scaled down to this machine "
            "by using small models and few images."
        ),
        Code(command),
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
        blocks += _make_claim_section(claim, command)
    return blocks


def _make_claim_section(claim: Claim, command: str) -> list[Block]:
    verdict = claim.verdict
    blocks: list[Block] = [Heading(f"{claim.number}. {claim.title}"), Paragraph(verdict, STATUSES[verdict])]
    notes = [Paragraph(note) for note in claim.notes]
    if verdict == NOT_TESTED:
        return [*blocks, *notes]
    blocks += [Paragraph(sentence) for sentence in quote_paper(claim.number)]
    blocks.append(Table(claim.header, claim.rows))
    if claim.curves:
        svg = plots.plot_interval_curves(claim.curves, claim.points, "query", claim.comparisons[0].metric)
        blocks.append(Figure(svg, "Shaded bands are 95% intervals."))
    else:
        blocks.append(_plot_claim_intervals(claim))
    return [
        *blocks,
        _make_comparison_table(claim),
        *notes,
        Paragraph(f"To test only this claim: `{command} --claims {claim.number}`"),
    ]


def _plot_claim_intervals(claim: Claim) -> Figure:
    intervals = {}
    for comparison in claim.comparisons:
        intervals[comparison.low] = comparison.low_interval
        intervals[comparison.high] = comparison.high_interval
    svg = plot_intervals(intervals, claim.comparisons[0].metric)
    return Figure(svg, "Each value is shown with its interval.")


def _make_comparison_table(claim: Claim) -> Table:
    header = ["lower", "higher", "metric", "lower (interval)", "higher (interval)", "difference (interval)", "result"]
    rows = []
    for comparison in claim.comparisons:
        number_format = ".3f" if comparison.metric == "seconds" else ".1f"
        intervals = (comparison.low_interval, comparison.high_interval, comparison.difference)
        formatted = [format_with_interval(value, limits, number_format) for value, *limits in intervals]
        rows.append([comparison.low, comparison.high, comparison.metric, *formatted, comparison.verdict])
    return Table(header, rows, statuses=STATUSES)


# ---- the paper's results ---------------------------------------------------------------------------------------------


def quote_paper(claim: int) -> list[str]:
    """Return sentences that state the paper's results for a claim."""
    if claim == 1:
        return [_describe_caption_retrieval(), CRA_NOTE]
    if claim == 2:
        return [
            _describe_averages(
                "clip_text_encoders", "CLIP", "e5 (XLM-R)", "jina-v3-XLM-R", "LLM2Vec-Llama-3-8B", "Llama-3-8B-CC"
            ),
            _describe_averages("eva02_text_towers", "Llama3-8B", "Jina Bert", "Llama3-8B-TC", "Llama3-8B-CC"),
        ]
    if claim == 3:
        return [_describe_gains("clip_text_encoders", "Llama-3-8B-CC", "CLIP")]
    if claim == 4:
        return [
            _describe_chinese_retrieval("multilingual_retrieval", t2i=1),
            _describe_chinese_retrieval("chinese_retrieval", t2i=3),
        ]
    if claim == 5:
        return [
            _describe_averages(
                "clip_text_encoders", "Qwen2.5-0.5B-CC", "Llama-3.2-1B-CC", "Llama-3-8B-CC", "Llama-3.1-8B-CC"
            ),
            _describe_averages("eva02_text_towers", "Llama3.2-1B-CC", "Llama3-8B-CC", "Mistral-Nemo-12B-CC"),
        ]
    return ["The paper computes the LLM's embeddings once, before training (section 3.3)."]


def _describe_caption_retrieval() -> str:
    values = ", ".join(f"{model} {value}" for model, value in CRA.items())
    gains = [f"{CRA[f'{llm}-CC'] - CRA[llm]:.1f} points for {llm}" for llm in ("Llama3-8B", "Llama3.2-1B")]
    return f"Paper (2026), CRA on COCO: {values}. Tuning adds {' and '.join(gains)}."


def _describe_averages(table_name: str, *models: str) -> str:
    table = TABLES[table_name]
    values = [f"{model} {_format_cell(table, model, 'average')}" for model in models]
    return f"Paper ({table.year}), average R@1 over five benchmarks: {', '.join(values)}."


def _describe_gains(table_name: str, tuned: str, reference: str) -> str:
    """Return a sentence with the gain of `tuned` over `reference` on each benchmark, averaged over both directions."""
    table = TABLES[table_name]
    gains = []
    for column in table.columns:
        high, low = table.get_cell(tuned, column), table.get_cell(reference, column)
        if column != "average" and high and low:
            gains.append(f"{column} {sum(high) / 2 - sum(low) / 2:+.1f}")
    return f"Paper ({table.year}), gain of {tuned} over {reference}, mean of I2T and T2I R@1: {', '.join(gains)}."


def _describe_chinese_retrieval(table_name: str, t2i: int) -> str:
    """Return a sentence with each model's T2I R@1 on Flickr30k-CN, the value at index `t2i` of each table cell."""
    table = TABLES[table_name]
    values = []
    for model in table.rows:
        cell = table.get_cell(model, "Flickr30k-CN")
        if cell:
            values.append(f"{model} {cell[t2i]}")
    return f"Paper ({table.year}), T2I R@1 on Flickr30k-CN: {', '.join(values)}."


def _format_cell(table: PublishedTable, model: str, column: str) -> str:
    return " / ".join(map(str, table.get_cell(model, column) or ()))


if __name__ == "__main__":
    main()
