"""Folder lock, which ensures that only one run writes to a folder at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llm2clip.store.layout import StoreError


@contextmanager
def folder_lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a lock on a folder. The operating system releases it when the process ends, even if the process is killed.

    Do nothing on file systems that do not support locks.

    Args:
        folder: Folder to lock. It is created if needed.
        name: Name of the lock file.

    Raises:
        StoreError: Another run holds the lock.
    """
    lock = FileLock(folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
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
