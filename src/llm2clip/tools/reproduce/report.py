"""Report of the `reproduce` command, with a summary table and a section for each claim."""

from __future__ import annotations

from collections.abc import Sequence

from llm2clip.config import ReproduceConfig
from llm2clip.evaluate.reporting import plots
from llm2clip.html_report import BAD, GOOD, UNSURE, Block, Code, Heading, Paragraph, Plot, Table
from llm2clip.tools.reproduce.paper import describe_paper
from llm2clip.tools.reproduce.statistics import (
    CONTRADICTED,
    HOLDS,
    INCONCLUSIVE,
    NOT_TESTED,
    PARTLY_HOLDS,
    WEAK_SUPPORT,
    Claim,
    Interval,
)

STATUSES = {
    HOLDS: GOOD,
    PARTLY_HOLDS: UNSURE,
    WEAK_SUPPORT: UNSURE,
    INCONCLUSIVE: UNSURE,
    NOT_TESTED: UNSURE,
    CONTRADICTED: BAD,
}


def make_report_blocks(claims: Sequence[Claim], config: ReproduceConfig, command: str) -> list[Block]:
    """Return the content blocks of the report.

    Args:
        claims: Claims to report, including claims that could not be tested.
        command: Shell command that started the run.
    """
    summary = [[claim.number, claim.title, claim.verdict] for claim in claims]
    blocks: list[Block] = [
        Paragraph(
            "Each claim of the paper (arXiv 2411.04997) is tested with the paper's method, scaled down to this "
            "machine: small models and few images."
        ),
        Code(command),
        Table(["number", "claim", "result"], summary, statuses=STATUSES),
        Paragraph(
            f"The vision tower ({config.tower}, {config.image_size} pixels) is frozen; the heads are trained for "
            f"{config.epochs:g} epochs. Values are means over {config.seeds} seeds, with 95% bootstrap intervals over "
            "test images and seeds."
        ),
        Paragraph(
            f"A comparison {HOLDS} if the intervals of its two sides are disjoint. It has {WEAK_SUPPORT} if only the "
            f"interval of the difference, paired by image, is above zero. It is {CONTRADICTED} if that interval is "
            f"below zero; otherwise it is {INCONCLUSIVE}. A claim {PARTLY_HOLDS} if some of its comparisons hold."
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
    blocks += [Paragraph(sentence) for sentence in describe_paper(claim.number)]
    blocks.append(Table(claim.header, claim.rows))
    blocks.append(_plot_claim_curves(claim) if claim.curves else _plot_claim_intervals(claim))
    return [
        *blocks,
        _make_comparison_table(claim),
        *notes,
        Paragraph(f"To test only this claim: `{command} --claims {claim.number}`"),
    ]


def _plot_claim_curves(claim: Claim) -> Plot:
    curves = {name: [mean for mean, _, _ in intervals] for name, intervals in claim.curves.items()}
    bands = {name: [(low, high) for _, low, high in intervals] for name, intervals in claim.curves.items()}
    svg = plots.plot_curves(
        curves,
        x=range(len(claim.points)),
        xlabel="query",
        ylabel=claim.comparisons[0].metric,
        bands=bands,
        tick_labels=claim.points,
    )
    return Plot(svg, "Shaded bands are 95% intervals.")


def _plot_claim_intervals(claim: Claim) -> Plot:
    intervals: dict[str, Interval] = {}
    for comparison in claim.comparisons:
        intervals[comparison.low] = comparison.low_interval
        intervals[comparison.high] = comparison.high_interval
    return Plot(plots.plot_intervals(intervals, claim.comparisons[0].metric), "Each value is shown with its interval.")


def _make_comparison_table(claim: Claim) -> Table:
    header = ["lower", "higher", "metric", "lower (interval)", "higher (interval)", "difference (interval)", "result"]
    rows = []
    for comparison in claim.comparisons:
        intervals = (comparison.low_interval, comparison.high_interval, comparison.difference)
        decimals = 3 if comparison.metric == "seconds" else 1
        formatted = [_format_interval(interval, decimals) for interval in intervals]
        rows.append([comparison.low, comparison.high, comparison.metric, *formatted, comparison.verdict])
    return Table(header, rows, statuses=STATUSES)


def _format_interval(interval: Interval, decimals: int) -> str:
    value, low, high = (f"{number:.{decimals}f}" for number in interval)
    return f"{value} ({low} to {high})"
