"""Iterating over training batches in a background thread."""

import signal
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import closing

import pytest
import torch

from conftest import Killed
from llm2clip.parallel import Prefetcher, prefetch_on_accelerator


class Source:
    """Generator of numbers that records what it has yielded, the threads that it ran in, and whether it was closed."""

    def __init__(self, count: int, error: BaseException | None = None) -> None:
        self.yielded: list[int] = []
        self.threads: set[int] = set()
        self.closed = False
        self.count, self.error = count, error

    def items(self) -> Generator[int]:
        try:
            for n in range(self.count):
                self.threads.add(threading.get_ident())
                self.yielded.append(n)
                yield n
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def test_items_arrive_in_order_from_another_thread() -> None:
    source = Source(20)
    with closing(Prefetcher(source.items())) as items:
        assert list(items) == list(range(20))
        assert next(items, None) is None
    assert source.closed and threading.get_ident() not in source.threads


@pytest.mark.parametrize("error", [OSError("disk"), Killed()], ids=repr)
def test_errors_are_raised_after_the_preceding_items(error: BaseException) -> None:
    received = []
    with closing(Prefetcher(Source(3, error).items())) as items, pytest.raises(type(error)) as raised:
        for item in items:
            received.append(item)
    assert raised.value is error and received == [0, 1, 2]


def test_closing_early_stops_the_thread_and_closes_the_source() -> None:
    source, threads = Source(1000), threading.active_count()
    with pytest.raises(KeyboardInterrupt), closing(Prefetcher(source.items(), depth=3)) as items:
        assert next(items) == 0
        raise KeyboardInterrupt
    assert source.closed and len(source.yielded) <= 1 + 3
    assert threading.active_count() == threads


PREFETCH_UNTIL_EXIT = """
import torch
from llm2clip.parallel import Prefetcher

def matmuls():
    x = torch.randn(800, 800)
    while True:
        yield x @ x

items = Prefetcher(matmuls(), depth=1_000_000)
next(items)
raise KeyboardInterrupt
"""


def test_exit_without_close_does_not_abort_the_process() -> None:
    process = subprocess.run([sys.executable, "-c", PREFETCH_UNTIL_EXIT], capture_output=True, text=True)
    assert process.returncode == -signal.SIGINT  # as of any Python program that Ctrl-C stops
    assert process.stderr.endswith("KeyboardInterrupt\n")


def test_prefetch_uses_no_thread_on_the_cpu() -> None:
    generator = Source(3).items()
    assert prefetch_on_accelerator(generator, torch.device("cpu")) is generator
    with closing(prefetch_on_accelerator(generator, torch.device("meta"))) as items:
        assert isinstance(items, Prefetcher) and list(items) == [0, 1, 2]
