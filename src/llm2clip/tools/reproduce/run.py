"""`llm2clip reproduce`: does what the paper claims hold, with the data and the weights at hand?"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.config import ReproduceConfig
from llm2clip.distributed import cached_json, command_line, print_once, process_state
from llm2clip.evaluate.reporting import plots
from llm2clip.html_report import BAD, GOOD, UNSURE, Block, Code, Heading, Paragraph, Plot, Table, write_report
from llm2clip.pipeline import start_run
from llm2clip.tools.reproduce.claims import CLAIMS
from llm2clip.tools.reproduce.datasets import ClaimData
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.tools.reproduce.statistics import ALIKE, HOLDS, REVERSED, UNTESTED, WAY, Claim, Comparison, Interval

STATUSES = {
    HOLDS: GOOD,
    WAY: UNSURE,
    ALIKE: UNSURE,
    "holds in part": UNSURE,
    REVERSED: BAD,
    "does not hold": BAD,
    UNTESTED: UNSURE,
}


def reproduce(data: Path, out: Path, config: ReproduceConfig, claims: Sequence[int], max_skipped: float) -> Path:
    """Test claims, write `out/report.md` and `out/report.html`; returns the latter. A run that was stopped goes on, and
    claims that were tested before are in the report, too.

    Args:
        data: folder that the recipe's sources are relative to.
        out: run folder.
        recipe: the settings.
        claims: their numbers.
        max_skipped: largest share of bad rows put up with.

    Raises:
        ValueError: there is no claim of a number, or several processes were started.
    """
    if unknown := [n for n in claims if n not in CLAIMS]:
        raise ValueError(f"no claim {unknown[0]}; there are {', '.join(map(str, CLAIMS))}")
    if process_state().num_processes > 1:
        raise ValueError("reproduce runs in one process: start it without torchrun or accelerate launch")
    log = start_run(out, {"data": data, "reproduce": config}, max_skipped)
    lab, untested = Experiments(ClaimData(data, config, log), config, out), []
    for number in claims:
        start, file = time.time(), out / "claims" / f"{number}.json"
        try:
            claim = claim_from_json(cached_json(file, partial(_tested, number, lab)))
        except (ValueError, OSError, FloatingPointError) as error:
            print_once(f"claim {number} is not tested: {error}")
            untested.append(Claim(number, notes=[str(error)]))
            continue
        print_once(f"claim {number}: {claim.verdict} ({(time.time() - start) / 60:.0f} minutes)")
    found = [claim_from_json(json.loads(f.read_text())) for n in CLAIMS if (f := out / "claims" / f"{n}.json").exists()]
    if not found:
        raise ValueError("no claim could be tested: " + "; ".join(f"{c.number}: {c.notes[0]}" for c in untested))
    found = sorted([*found, *untested], key=lambda claim: claim.number)
    command = command_line()
    page, whole = write_report(
        out, "report", "Does it hold? The claims of LLM2CLIP, tested here", claim_blocks(found, config, command)
    )
    print_once(page.read_text(), log.summary())
    return whole


def _tested(number: int, lab: Experiments) -> dict[str, Any]:
    return dataclasses.asdict(CLAIMS[number](lab))


def claim_from_json(fields: dict[str, Any]) -> Claim:
    """A claim as it was saved."""
    claim = Claim(**fields)
    claim.comparisons = [Comparison(**comparison) for comparison in fields["comparisons"]]
    return claim


def claim_blocks(claims: Sequence[Claim], config: ReproduceConfig, command: str) -> list[Block]:
    """The report."""
    found: list[Block] = [
        Paragraph(
            "Each claim of the paper (arXiv 2411.04997), at the scale of this machine: small models, few images, the "
            "same method."
        ),
        Code(command),
        Table(["", "claim", "here"], [[c.number, c.title, c.verdict] for c in claims], statuses=STATUSES),
        Paragraph(
            f"Heads learn between a text tower and a frozen vision tower ({config.tower}, {config.image_size} pixels) "
            f"in {config.epochs:g} passes; figures are means of {config.seeds} seeds. A comparison holds where the 95% "
            "intervals of its two sides do not touch (bootstrap of test images and seeds); it points that way where "
            "only the interval of the difference, image by image, is above zero."
        ),
    ]
    for claim in claims:
        found += [Heading(f"{claim.number}. {claim.title}"), Paragraph(claim.verdict, STATUSES.get(claim.verdict, ""))]
        if claim.verdict == UNTESTED:
            found += [Paragraph(note) for note in claim.notes]
            continue
        found += [Paragraph(f"The paper: {claim.paper}."), Table(claim.header, claim.rows)]
        if claim.curves:
            found.append(
                Plot(
                    plots.plot_curves(
                        {name: [middle for middle, *_ in some] for name, some in claim.curves.items()},
                        range(len(claim.points)),
                        "query",
                        claim.header[0].partition(", ")[2],
                        {name: [(low, high) for _, low, high in some] for name, some in claim.curves.items()},
                        claim.points,
                    ),
                    "Bands are 95% intervals.",
                )
            )
        elif claim.comparisons:
            sides = {
                name: figure
                for c in claim.comparisons
                for name, figure in ((c.low, c.low_figure), (c.high, c.high_figure))
            }
            found.append(Plot(plots.plot_intervals(sides, claim.comparisons[0].of), "Each with its interval."))
        header = ["lower", "higher", "of", "lower, with interval", "higher, with interval", "difference", "verdict"]
        rows = [
            [c.low, c.high, c.of, *(_figure(i, c.of) for i in (c.low_figure, c.high_figure, c.difference)), c.verdict]
            for c in claim.comparisons
        ]
        found.append(Table(header, rows, statuses=STATUSES))
        found += [Paragraph(note) for note in claim.notes]
        found.append(Paragraph(f"This claim alone: `{command} --claims {claim.number}`"))
    return found


def _figure(interval: Interval, of: str) -> str:
    places = 3 if of == "seconds" else 1
    return f"{interval[0]:.{places}f} ({interval[1]:.{places}f} to {interval[2]:.{places}f})"
