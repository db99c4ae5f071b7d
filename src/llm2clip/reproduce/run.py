"""`llm2clip reproduce`: does what the paper claims hold, with the data and the weights at hand?"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.evaluate import plots
from llm2clip.page import BAD, GOOD, UNSURE, Block, Command, Heading, Plot, Table, Text, write_page
from llm2clip.processes import once, processes, say, typed
from llm2clip.recipes import ReproduceRecipe
from llm2clip.reproduce.claims import CLAIMS
from llm2clip.reproduce.data import Sets
from llm2clip.reproduce.lab import Lab
from llm2clip.reproduce.verdicts import ALIKE, HOLDS, REVERSED, UNTESTED, WAY, Claim, Comparison, Interval
from llm2clip.stages import begin

MOODS = {
    HOLDS: GOOD,
    WAY: UNSURE,
    ALIKE: UNSURE,
    "holds in part": UNSURE,
    REVERSED: BAD,
    "does not hold": BAD,
    UNTESTED: UNSURE,
}


def reproduce(data: Path, out: Path, recipe: ReproduceRecipe, claims: Sequence[int], max_skipped: float) -> Path:
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
    if processes().num_processes > 1:
        raise ValueError("reproduce runs in one process: start it without torchrun or accelerate launch")
    log = begin(out, {"data": data, "reproduce": recipe}, max_skipped)
    lab, untested = Lab(Sets(data, recipe, log), recipe, out), []
    for number in claims:
        start, file = time.time(), out / "claims" / f"{number}.json"
        try:
            claim = of_json(once(file, partial(_tested, number, lab)))
        except (ValueError, OSError, FloatingPointError) as error:
            say(f"claim {number} is not tested: {error}")
            untested.append(Claim(number, notes=[str(error)]))
            continue
        say(f"claim {number}: {claim.verdict} ({(time.time() - start) / 60:.0f} minutes)")
    found = [of_json(json.loads(f.read_text())) for n in CLAIMS if (f := out / "claims" / f"{n}.json").exists()]
    if not found:
        raise ValueError("no claim could be tested: " + "; ".join(f"{c.number}: {c.notes[0]}" for c in untested))
    found = sorted([*found, *untested], key=lambda claim: claim.number)
    command = typed()
    page, whole = write_page(
        out, "report", "Does it hold? The claims of LLM2CLIP, tested here", blocks(found, recipe, command)
    )
    say(page.read_text(), log.summary())
    return whole


def _tested(number: int, lab: Lab) -> dict[str, Any]:
    return dataclasses.asdict(CLAIMS[number](lab))


def of_json(fields: dict[str, Any]) -> Claim:
    """A claim as it was saved."""
    claim = Claim(**fields)
    claim.comparisons = [Comparison(**comparison) for comparison in fields["comparisons"]]
    return claim


def blocks(claims: Sequence[Claim], recipe: ReproduceRecipe, command: str) -> list[Block]:
    """The report."""
    moods = tuple(MOODS.items())
    found: list[Block] = [
        Text(
            "Each claim of the paper (arXiv 2411.04997), at the scale of this machine: small models, few images, the "
            "same method."
        ),
        Command(command),
        Table(["", "claim", "here"], [[c.number, c.title, c.verdict] for c in claims], moods=moods),
        Text(
            f"Heads learn between a text tower and a frozen vision tower ({recipe.tower}, {recipe.image_size} pixels) "
            f"in {recipe.epochs:g} passes; figures are means of {recipe.seeds} seeds. A comparison holds where the 95% "
            "intervals of its two sides do not touch (bootstrap of test images and seeds); it points that way where "
            "only the interval of the difference, image by image, is above zero."
        ),
    ]
    for claim in claims:
        found += [Heading(f"{claim.number}. {claim.title}"), Text(claim.verdict, MOODS.get(claim.verdict, ""))]
        if claim.verdict == UNTESTED:
            found += [Text(note) for note in claim.notes]
            continue
        found += [Text(f"The paper: {claim.paper}."), Table(claim.header, claim.rows)]
        if claim.curves:
            found.append(
                Plot(
                    plots.curves(
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
            found.append(Plot(plots.intervals(sides, claim.comparisons[0].of), "Each with its interval."))
        header = ["lower", "higher", "of", "lower, with interval", "higher, with interval", "difference", "verdict"]
        rows = [
            [c.low, c.high, c.of, *(_figure(i, c.of) for i in (c.low_figure, c.high_figure, c.difference)), c.verdict]
            for c in claim.comparisons
        ]
        found.append(Table(header, rows, moods=moods))
        found += [Text(note) for note in claim.notes]
        found.append(Text(f"This claim alone: `{command} --claims {claim.number}`"))
    return found


def _figure(interval: Interval, of: str) -> str:
    places = 3 if of == "seconds" else 1
    return f"{interval[0]:.{places}f} ({interval[1]:.{places}f} to {interval[2]:.{places}f})"
