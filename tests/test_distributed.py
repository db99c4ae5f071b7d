"""Timeouts of collective operations and waits, and ranks that exit or hang."""

import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from conftest import HANG_TIMEOUT, run_distributed
from llm2clip import cli
from llm2clip.runs import ranks as distributed
from llm2clip.runs.ranks import COLLECTIVE_TIMEOUT, PEER_FAILED, WAIT_TIMEOUT, process_state, wait_for_everyone

SHORT = timedelta(seconds=1)


def test_ranks_wait_long_for_one_rank_but_not_in_collective_operations(tmp_path: Path) -> None:
    run_distributed(2, _work_on_one_rank, tmp_path)
    assert (tmp_path / "1").read_text() == "ok"


def _work_on_one_rank(folder: Path) -> None:
    world = torch.distributed.group.WORLD
    backend = world._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    assert backend.options._timeout == COLLECTIVE_TIMEOUT < timedelta(hours=1)
    waits = distributed._get_gloo_group(world)
    assert waits._get_backend(torch.device("cpu")).options._timeout == WAIT_TIMEOUT >= timedelta(hours=12)

    _set_pg_timeout(SHORT, world)
    main = process_state().is_main_process
    if main:
        time.sleep(2 * SHORT.total_seconds())
    wait_for_everyone()
    if main:  # never takes part in the next operation
        while not (folder / "1").exists():
            time.sleep(0.01)
    else:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            torch.distributed.all_reduce(torch.ones(1))
        (folder / "1").write_text("ok")


def test_a_killed_rank_ends_the_other_ranks_with_a_message(tmp_path: Path) -> None:
    ranks = run_distributed(2, _kill_one_rank, tmp_path, join=False)
    for rank in ranks.processes:
        rank.join(HANG_TIMEOUT)
    assert [rank.exitcode for rank in ranks.processes] == [0, -signal.SIGKILL]
    assert PEER_FAILED in (tmp_path / "wait").read_text()
    assert PEER_FAILED in (tmp_path / "collective").read_text()


def _kill_one_rank(folder: Path) -> None:
    if process_state().process_index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    parser, commands = cli.build_parser()
    operations = {"wait": wait_for_everyone, "collective": lambda: torch.distributed.all_reduce(torch.ones(1))}
    for name, operation in operations.items():
        replaced = {**commands, "benchmarks": lambda _, operation=operation: operation()}
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as raised:
            patch.setattr(cli, "build_parser", lambda replaced=replaced: (parser, replaced))
            cli.main(["benchmarks"])
        (folder / name).write_text("".join(traceback.format_exception(raised.value)))
    os._exit(0)  # without `shut_down_process_group`, which would wait for the killed process
