"""Atomic writes, checksums, text validation, formatting of counts and sizes, and readers for JSON and text files."""

import codecs
import errno
import glob
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 2 << 30  # size limit for JSON files, which are read into memory at once
MAX_LINE_CHARACTERS = 1 << 25
EXTRAS = {  # importable modules of each extra in pyproject.toml
    "caption": ("httpx", "py3langid"),
    "dense": ("pycocotools",),
    "mcp": ("mcp",),
    "ocr": ("onnxruntime", "rapidocr"),
    "onnx": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
    "open-clip": ("open_clip",),
    "postgres": ("pgvector", "psycopg"),
    "qlora": ("bitsandbytes",),
    "quickstart": ("emoji", "resvg_py"),
    "ray": ("ray",),
    "search": (
        *("fastapi", "h11", "httpx", "prometheus_client", "pydantic", "pydantic_core", "python_multipart"),
        *("starlette", "usearch", "uvicorn"),
    ),
}
CHECKSUM_BYTES = 4
_CRC32_RESIDUE = 0x2144DF1C  # CRC-32 of any data followed by its own CRC-32
_BYTE_ORDER_MARKS = (  # UTF-32 precedes UTF-16, because the UTF-32-LE mark starts with the UTF-16-LE mark
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Chinese and Japanese.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_URL_PASSWORD = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*://)[^\s/@'\"<>]*@")
_URL_QUERY = re.compile(r"\b(https?://[^\s?'\"<>]+)\?(?:[^\s'\"<>]*[^\s'\"<>:,;.)\]])?", re.IGNORECASE)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class MissingFileError(FileNotFoundError):
    """Raised when a file or folder of a dataset is missing. The message contains the path."""


class DataFormatError(ValueError):
    """Raised when a file has an invalid format. The message contains the file name and the position of the error."""


class FatalDataError(ValueError):
    """Raised when an error, such as a full disk, affects all rows and therefore stops the run."""


# ---- atomic writes -------------------------------------------------------------------------------------------------


@contextmanager
def atomic_path(file: str | Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file next to `file`. On success, flush it and rename it to `file`.

    Readers see either the old file or the complete new file. If the `with` block raises an exception, the temporary
    file is removed. Temporary files left behind by killed processes are also removed. The parent folder is created if
    needed.
    """
    file = Path(file)
    # The temporary name has the same suffix as the file, because functions such as np.save append a missing suffix.
    affixes = f".{file.stem}.", f".part{file.suffix}"
    with _replace_on_success(file, *affixes, create=lambda path: path.touch(exist_ok=False)) as temporary:
        yield temporary


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder. On success, rename it to `folder`, which must not exist (see `atomic_path`)."""
    folder = Path(folder)
    with _replace_on_success(folder, f".{folder.name}.", ".part", create=Path.mkdir) as temporary:
        yield temporary


@contextmanager
def _replace_on_success(target: Path, prefix: str, suffix: str, create: Callable[[Path], None]) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned_temp_files(target.parent, prefix, suffix)
    # With a predictable name, other users with write access to the folder could create a link at the temporary path.
    temporary = target.with_name(f"{prefix}{secrets.token_hex(8)}{suffix}")
    create(temporary)
    mode = temporary.stat().st_mode
    try:
        with _hold_temp_file_lock(temporary), explain_write_errors(target):
            yield temporary
            for path in [temporary, *temporary.rglob("*")]:
                if path.is_dir():
                    fsync_folder(path)  # so that no file is missing from the folder after a power failure
                else:
                    restore_file_mode(path, mode)
                    fsync_file(path)
            temporary.replace(target)
        fsync_folder(target.parent)
    finally:
        remove_path(temporary)


def remove_path(path: Path) -> None:
    """Remove a file, folder or symbolic link if it exists. The target of a link is not removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _hold_temp_file_lock(path: Path) -> Iterator[None]:
    """Lock a temporary file or folder. Do nothing if the operating system or the file system does not support locks."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_abandoned_temp_files(folder: Path, prefix: str, suffix: str) -> None:
    if fcntl is None:
        return
    for name in glob.glob(f"{glob.escape(prefix)}{'[0-9a-f]' * 16}{glob.escape(suffix)}", root_dir=folder):
        path = folder / name
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_path(path)
            finally:
                os.close(descriptor)


def atomic_write_text(file: str | Path, text: str) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def atomic_write_jsonl(file: str | Path, rows: Iterable[Any]) -> None:
    atomic_write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Convert write errors, such as a full disk, to an OSError whose message contains the path and the free space.

    safetensors raises its own exception type, so the operating system's error number is parsed from the message.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            number = error.errno if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        else:
            match = re.search(r"\(os error (\d+)\)", str(error))
            number = int(match[1]) if match else None
        if number is None:
            raise
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(folder).free / 1e9
        message = f"cannot write {path}: {os.strerror(number)} (free space: {free:.2f} GB)"
        raise OSError(message) from error


def restore_file_mode(file: Path, mode: int) -> None:
    """Set the read and write permissions in `mode`, because safetensors lets only the owner read new files."""
    if os.name == "posix":
        with suppress(OSError):  # some file systems do not support permissions
            file.chmod(mode & 0o666)


def fsync_file(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a file renamed within it survives a power failure."""
    with suppress(OSError):  # Windows and some network file systems cannot flush folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_checksum(file: Path) -> None:
    """Append a 4-byte CRC-32 to a file, for use by `has_valid_checksum`. `np.load` ignores the appended bytes."""
    checksum = _compute_crc32(file)
    with file.open("ab") as stream:
        stream.write(checksum.to_bytes(CHECKSUM_BYTES, "little"))


def has_valid_checksum(file: Path) -> bool:
    """Return True if a file has not changed since `append_checksum` was called on it. Raise OSError if the file cannot
    be read."""
    return _compute_crc32(file) == _CRC32_RESIDUE


def _compute_crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


def get_cache_dir() -> Path:
    """Return the user's cache folder: $LLM2CLIP_CACHE, $XDG_CACHE_HOME/llm2clip or ~/.cache/llm2clip.

    If the folder does not exist, it is created with access only for the user.
    """
    default = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "llm2clip")
    folder = Path(os.environ.get("LLM2CLIP_CACHE") or default).expanduser()
    if not folder.is_dir():  # skips mkdir, because this function is called for each remote image
        with suppress(OSError):  # writing a file to the folder will raise the same error
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def escape_control_characters(text: str) -> str:
    """Replace control characters other than newlines and tabs with escape sequences such as \\x1b, for printing.

    File names and texts from datasets can contain sequences that a terminal interprets as commands.
    """
    return _CONTROL_CHARACTER.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def hide_url_secrets(text: str) -> str:
    """Remove user names, passwords and query strings, which can contain credentials, from all URLs in a message."""
    if "://" not in text:
        return text
    return _URL_QUERY.sub(r"\1", _URL_PASSWORD.sub(r"\1", text))


def format_install_command(*extras: str) -> str:
    """Return the pip command that installs llm2clip with the given extras."""
    return f"pip install 'llm2clip[{','.join(extras)}]'" if extras else "pip install llm2clip"


def require_extra(extra: str, feature: str, error: type[Exception] = ModuleNotFoundError) -> None:
    """Raise an error if a package of an extra (a key of `EXTRAS`) is not installed. The packages are not imported."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise error(
            f"{feature} requires additional packages ({', '.join(missing)}). Run {format_install_command(extra)}"
        )


# ---- texts ---------------------------------------------------------------------------------------------------------


def is_valid_unicode(text: str) -> bool:
    """Return True if a text can be encoded as UTF-8, that is, if it contains no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def to_valid_unicode(name: str) -> str:
    """Convert a file name to valid Unicode. Bytes that are not UTF-8 are replaced with escape sequences."""
    return name.encode("utf-8", "backslashreplace").decode()


def check_texts(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts. Raise TypeError or ValueError for the first text that is not a string or not valid Unicode."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {index} must be a string (got {text!r}). Remove or replace this value")
        if not is_valid_unicode(text):
            raise ValueError(
                f"text {index} is not valid Unicode: it contains a lone surrogate ({text[:200]!a}). Remove the "
                "text, or decode it again with the right encoding"
            )
        yield text


def check_texts_not_empty(texts: Iterable[str]) -> None:
    """Raise ValueError if a text is empty or contains only whitespace."""
    for index, text in enumerate(texts):
        if isinstance(text, str) and not text.strip():
            raise ValueError(f"text {index} is empty. Describe what the image should show")


def hash_text_to_int64(text: str) -> int:
    """Hash a text to a signed 64-bit integer. All processes compute the same hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def format_count(count: int, noun: str) -> str:
    """Format a count with its noun, such as "1 image" or "1,000 images"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def format_bytes(size: float) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.1f} {unit}"
    return f"{size / 1e3:,.1f} kB"


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units, such as "45 s", "6 min 49 s" or "2 h 5 min"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def describe_error(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


# ---- readers -------------------------------------------------------------------------------------------------------


def open_regular_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file in binary mode. Raise OSError for named pipes and devices, whose data may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # `open` raises an error for folders
        raise OSError(f"{os.fspath(path)} is not a regular file")
    return open(path, "rb")


def find_first_existing(folder: Path, *names: str) -> Path:
    """Return the first file or folder in `names` that exists in `folder`.

    Raises:
        MissingFileError: `folder` contains none of these files or folders.
    """
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise MissingFileError(f"{folder} has no {' or '.join(names)}")


def read_json(file: Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Read a JSON file. `object_hook` is applied to each JSON object, as in `json.loads`.

    Raises:
        DataFormatError: The file is not valid JSON, is nested too deeply, or is larger than `MAX_JSON_BYTES`.
    """
    with open_regular_file(file) as stream:
        check_json_size(file, stream)
        data = stream.read()
    try:
        return json.loads(data.decode(), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{file}: not JSON ({error})") from error


def read_json_object(file: Path) -> dict[str, Any]:
    value = read_json(file)
    if not isinstance(value, dict):
        raise DataFormatError(f"{file} must contain a JSON object (got {type(value).__name__})")
    return value


def check_json_size(file: str | Path, stream: BinaryIO) -> None:
    """Raise DataFormatError if an open JSON file is larger than `MAX_JSON_BYTES`."""
    size = os.fstat(stream.fileno()).st_size
    if size > MAX_JSON_BYTES:
        raise DataFormatError(
            f"{file} is too large: {size:,} bytes (limit: {MAX_JSON_BYTES:,} bytes). Convert the file to JSON Lines"
        )


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) for each non-empty line. Raise DataFormatError if a line is not a JSON object."""
    for number, line in _read_numbered_lines(file):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"{file}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataFormatError(f"{file}, line {number}: not a JSON object")
        yield number, row


def sanitize_file_name(name: str) -> str:
    """Replace characters that may be invalid in file names with dashes."""
    return re.sub(r"[^\w.-]+|^\.+", "-", name)


def read_lines(file: Path) -> list[str]:
    """Return the non-empty lines of a text file (see `iterate_lines`)."""
    return list(iterate_lines(file))


def iterate_lines(file: Path) -> Iterator[str]:
    """Yield the non-empty lines of a UTF-8 or UTF-16 text file. Raise DataFormatError if the file cannot be decoded."""
    return (line for _, line in _read_numbered_lines(file))


def _read_numbered_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) for each non-empty line. Line numbers start at 1.

    Lines are split only at newlines. `str.splitlines` would also split at U+2028 and U+0085, which occur in captions.
    """
    with open_regular_file(file) as binary_stream:
        encoding = detect_encoding(binary_stream.read(4))
        binary_stream.seek(0)
        stream = io.TextIOWrapper(binary_stream, encoding)
        try:
            number = 0
            while line := stream.readline(MAX_LINE_CHARACTERS + 1):
                number += 1
                if len(line) > MAX_LINE_CHARACTERS:
                    raise DataFormatError(f"{file}, line {number}: more than {MAX_LINE_CHARACTERS:,} characters")
                if "\0" in line:
                    raise DataFormatError(f"{file}, line {number}: not text (it contains null characters)")
                if line.strip():
                    yield number, line.rstrip("\n")
        except UnicodeError as error:
            name = encoding.removesuffix("-sig").upper()
            raise DataFormatError(f"{file}: not {name} ({error}). Convert the file to UTF-8") from error


def detect_encoding(start: bytes) -> str:
    """Detect a file's encoding from its first four bytes. Return "utf-8-sig", or the name of a UTF-16 or UTF-32 codec.

    A file without a byte order mark is treated as UTF-16 if every other byte is 0, because caption files start with
    ASCII characters.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    if zeros == [True, False, True, False]:
        return "utf-16-be"
    return "utf-8-sig"
