"""Locks that ensure that only one run writes to a folder at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

RUN_LOCK = ".run.lock"  # held during all stages of a run, each of which also locks its own folder


class FolderInUseError(ValueError):
    """Another run is writing to a folder."""


@contextmanager
def folder_lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a lock on a folder. The operating system releases it when the process ends, even if the process is killed.

    Do nothing on file systems that do not support locks.

    Args:
        folder: Folder to lock. It is created if needed.
        name: Name of the lock file.

    Raises:
        FolderInUseError: Another run holds the lock.
    """
    lock = FileLock(folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"another run is writing to {folder}. Wait until it has finished, or use another folder"
        ) from None
    except NotImplementedError:
        pass  # raised by filelock < 3.20 if the file system does not support locks
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory on the main process. Acquire it before the run writes any file.

    Raises:
        FolderInUseError: Another run holds the lock.
    """
    from llm2clip.runs.ranks import process_state  # imports torch, which is too slow to import when a command starts

    with folder_lock(run_dir, RUN_LOCK) if process_state().is_main_process else nullcontext():
        yield
