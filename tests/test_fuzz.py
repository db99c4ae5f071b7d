"""A few mutated inputs of each reader. `benchmarks/fuzz.py` tests many more, with limits on time and memory."""

from collections import Counter
from pathlib import Path

import pytest

from conftest import load_benchmark

fuzz = load_benchmark("fuzz")
COUNTS = {"images": 500, "parquet": 300, "tar": 300}  # the other readers are faster, or their inputs less varied


@pytest.mark.parametrize("name", list(fuzz.READERS))
def test_mutated_inputs_are_read_or_rejected_with_a_documented_exception(name: str, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(name, 1, tmp_path)
    outcomes: Counter[str] = Counter()
    for number in range(COUNTS.get(name, 200)):
        outcome, errors = fuzzer.run(number)
        assert outcome in ("read", "rejected"), f"input {number}: {errors}"
        outcomes[outcome] += 1
    assert outcomes["read"] >= 10 and outcomes["rejected"] >= 10


def test_fuzzer_reports_an_exception_that_is_not_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.READERS["jsonl"], "read", lambda *_: {}["missing"])
    outcome, [error] = fuzz.Fuzzer("jsonl", 0, tmp_path).run(0)
    assert outcome == "escaped" and error.startswith("KeyError: 'missing'")
