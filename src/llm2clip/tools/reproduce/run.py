"""The `reproduce` command, which tests the claims of the LLM2CLIP paper with small models on local data."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from llm2clip.config import ReproduceConfig
from llm2clip.html_report import write_report
from llm2clip.io_utils import read_json
from llm2clip.pipeline import start_run
from llm2clip.runs.output_folder import run_lock
from llm2clip.runs.ranks import cached_json, print_once, process_state
from llm2clip.runs.run_description import format_command_line
from llm2clip.tools.reproduce.claims import CLAIMS
from llm2clip.tools.reproduce.datasets import ClaimData
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.tools.reproduce.report import make_report_blocks
from llm2clip.tools.reproduce.statistics import NOT_TESTED, Claim


def reproduce(data: Path, out: Path, config: ReproduceConfig, claims: Sequence[int], max_skipped: float) -> Path:
    """Test the claims and write `out/report.md` and `out/report.html`.

    An interrupted run can be resumed. The report also includes the claims that earlier runs in `out` have tested.

    Args:
        data: Data folder. The source paths in the config are relative to this folder.
        config: Data sources, models and training settings.
        claims: Numbers of the claims to test, from 1 to 6.
        max_skipped: Abort if more than this fraction of the rows cannot be used.

    Returns:
        Path of the HTML report.

    Raises:
        ValueError: A claim number is unknown, no claim could be tested, or there are several processes.
    """
    unknown = [number for number in claims if number not in CLAIMS]
    if unknown:
        raise ValueError(f"unknown claim {unknown[0]}: the claims are {', '.join(map(str, CLAIMS))}")
    if process_state().num_processes > 1:
        raise ValueError("reproduce runs in a single process: start it without torchrun or accelerate launch")
    with run_lock(out):
        return _test_claims(data, out, config, claims, max_skipped)


def _test_claims(data: Path, out: Path, config: ReproduceConfig, claims: Sequence[int], max_skipped: float) -> Path:
    log = start_run(out, {"data": data, "reproduce": config}, max_skipped)
    experiments = Experiments(ClaimData(data, config, log), config, out)

    files = {number: out / "claims" / f"{number}.json" for number in CLAIMS}
    untested = []
    for number in claims:
        start = time.time()
        compute = partial(_test_claim, number, experiments)
        try:
            claim = Claim.from_dict(cached_json(files[number], compute))
        except (ValueError, OSError, FloatingPointError) as error:
            print_once(f"claim {number}: {NOT_TESTED} ({error})")
            untested.append(Claim(number, notes=[str(error)]))
            continue
        print_once(f"claim {number}: {claim.verdict} ({(time.time() - start) / 60:.0f} minutes)")

    tested = [Claim.from_dict(read_json(file)) for file in files.values() if file.exists()]
    if not tested:
        reasons = "; ".join(f"{claim.number}: {claim.notes[0]}" for claim in untested)
        raise ValueError(f"no claim could be tested: {reasons}")
    reported = sorted([*tested, *untested], key=lambda claim: claim.number)
    blocks = make_report_blocks(reported, config, format_command_line())
    markdown_file, html_file = write_report(out, "report", "Tests of the claims of LLM2CLIP", blocks)
    print_once(markdown_file.read_text(encoding="utf-8"), log.summary())
    return html_file


def _test_claim(number: int, experiments: Experiments) -> dict[str, object]:
    return CLAIMS[number](experiments).to_dict()
