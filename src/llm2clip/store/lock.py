"""One run at a time in a folder that is being filled."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llm2clip.store.layout import StoreError

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when the process ends, however it ends.

    Raises:
        StoreError: another run holds it.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise StoreError(
                        f"another run is filling {folder}; wait for it, or choose another folder"
                    ) from None
                # else: a file system without locks
        yield
    finally:
        os.close(file)
