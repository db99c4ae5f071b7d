"""Lock of a folder that one run at a time may write to."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llm2clip.store.layout import StoreError


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The operating system releases it when the process ends, even if it is killed.

    On file systems without locks nothing is locked.

    Raises:
        StoreError: another run holds the lock.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(
            f"another run is writing to {folder}. Wait until it has finished, or use another folder"
        ) from None
    except NotImplementedError:
        pass  # before filelock 3.20: no locks on this file system
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        lock.release()
