"""The processes of a run, as `torchrun` or `accelerate launch` started them; one alone where nobody did.

This is at the bottom of the house: every stage asks here who it is and waits here for the others.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process among the others of its run; the first call joins them.

    Accelerate takes processes on machines without an accelerator for strangers unless it is told that they compute on
    the CPU. Whoever waits for another's measurement waits as long as it takes.
    """
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def leave() -> None:
    """Part from the other processes once all are here; one that just ends can fail those that still work."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes().wait_for_everyone()
        torch.distributed.destroy_process_group()
