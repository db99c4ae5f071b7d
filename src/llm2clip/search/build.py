"""`llm2clip index`: pictures into an index. What is new or changed is embedded, what is gone is dropped; each batch is
kept, so that a run that was stopped goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.data.image_header import readable_formats
from llm2clip.data.image_loader import image_batches
from llm2clip.data.image_refs import TarImage, printable
from llm2clip.data.images import make_thumbnail
from llm2clip.data.readers.tar import list_files
from llm2clip.data.records import Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.fingerprint import fingerprint
from llm2clip.search.types import PLACES, Backend, IndexedContent, IndexedImage

THUMBNAIL = 256  # pixels of the longer side
CHUNK = 8192  # pictures that are read before the new ones among them are embedded
UNREAD = frozenset({"heic", "heif", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raw", "psd", "svg", "jxl"})
EXIF, DATE_TAKEN, DATE = 0x8769, 0x9003, 0x0132  # tags


@dataclass
class IndexReport:
    """How many pictures were added, changed and dropped by a run, and how many had to be embedded."""

    added: int = 0
    changed: int = 0
    dropped: int = 0
    embedded: int = 0

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.dropped)

    def __str__(self) -> str:
        return (
            f"{self.added:,} pictures added, {self.changed:,} changed, {self.dropped:,} dropped; "
            f"{self.embedded:,} embedded"
        )


def build_index(
    sources: Sequence[str],
    model: DualEncoder,
    engine: Backend,
    log: SkipLog,
    columns: dict[str, str] | None = None,
    batch: int = 64,
    workers: int | None = None,
    gone: bool = False,
) -> IndexReport:
    """Bring an index to what sources hold now.

    Args:
        sources: of pictures, as of `open_records`, folders with all that is in them; captions are kept where there are
            any.
        model: what makes the vectors.
        engine: of the index. Pictures of sources that are not named here stay in it.
        log: where pictures that cannot be read are counted and listed.
        columns: our field to the sources' column.
        batch: pictures in a forward pass, and kept at once.
        workers: processes that decode, as of `in_batches`.
        gone: a source that is not there any more, or empty, is no mistake: its pictures are dropped.

    Raises:
        ValueError: the index is another model's.
        OSError: a source is not there, or a folder in it cannot be listed.
        TooManySkipped: too many pictures cannot be read.
    """
    if about := engine.about():
        check_model(about, model)
    else:
        name = os.path.abspath(model.name) if os.path.isdir(model.name) else model.name
        engine.begin({"model": name, "fingerprint": fingerprint(model.identity()), "width": model.embed_dim})
    parsed = [_absolute(Source.parse(s), columns or {}) for s in sources]
    found: dict[str, IndexedImage] = {}
    for source in parsed:
        for picture in find_images(source, log, gone):
            same = found.get(picture.name)
            if same is not None and isinstance(same.place, TarImage) and same.place != picture.place:
                picture = dataclasses.replace(
                    picture, name=printable(picture.place.key)
                )  # a tar may hold two of one name
                same = found.get(picture.name)
            if same is not None:  # captions in a file beside the pictures, say
                texts = tuple(dict.fromkeys([*same.captions, *picture.captions]))
                picture = dataclasses.replace(same, captions=texts)
            found[picture.name] = picture
    known = engine.known([printable(str(source)) for source in parsed])
    fresh = [p for p in found.values() if known.get(p.name) != (p.stamp, p.captions)]
    kept, embedded = _add(fresh, model, engine, log, batch, workers)
    stale = {p.name for p in fresh} - kept  # whose file changed to what cannot be read
    log.check()  # before anything is lost
    folders = [f"{source.path.rstrip('/')}/" for source in parsed if os.path.isdir(source.path)]
    gone_names = [n for n, (stamp, _) in known.items() if n not in found and not _unread(n, stamp, folders)]
    engine.forget([*gone_names, *(n for n in known if n in stale)])
    engine.finish()
    dropped = len(gone_names) + len(stale & known.keys())
    return IndexReport(len(kept - known.keys()), len(kept & known.keys()), dropped, embedded)


def _unread(name: str, stamp: str, folders: Sequence[str]) -> bool:
    """Whether a picture that was not found is a file that lies in one of the folders as it was: its disk gave an error,
    and that is no reason to forget it."""
    try:
        there = os.stat(name)
    except (OSError, ValueError):
        return False
    return stamp == f"{there.st_size} {there.st_mtime_ns}" and any(name.startswith(folder) for folder in folders)


def check_model(about: Mapping[str, Any], model: DualEncoder) -> None:
    """Raises ValueError if a model is not the one that an index was made with: their vectors have nothing in common."""
    if about["fingerprint"] != fingerprint(model.identity()):
        raise ValueError(
            f"the index was made with {about['model']} as it was then, whose vectors are not those of {model.name}: "
            "name that model, or make an index of this one in another folder"
        )


def find_images(source: Source, log: SkipLog, gone: bool = False) -> Iterator[IndexedImage]:
    """What a source holds, as far as the files' headers tell.

    Raises:
        ValueError: its pictures are not in files here, or it has none and `gone` is off.
        OSError: as of `index`.
    """
    try:
        records = open_records(source, log, require_captions=False)
    except FileNotFoundError as error:
        if gone:
            return
        raise FileNotFoundError(f"{error}\nif it is gone for good, --gone drops its pictures from the index") from error
    if os.path.isdir(source.path):
        for path in list_files(source.path, UNREAD):
            log.count_row()
            log.skip(path, 0, "unknown format", "")
    for record in records:
        if record.image is None:
            log.skip(record.id, 0, "no image", "")
            continue
        if type(record.image).__name__ not in PLACES:
            raise ValueError(f"{source}: its pictures are not in files here; save_to_disk makes files of it")
        try:
            there = os.stat(record.image.container_path or "")
        except FileNotFoundError:
            continue  # it went while this looked
        stamp = f"{there.st_size} {there.st_mtime_ns}"
        yield IndexedImage(
            printable(record.image.canonical_path),
            record.image,
            printable(str(source)),
            stamp,
            record.texts,
            there.st_mtime,
        )


def _absolute(source: Source, columns: dict[str, str]) -> Source:
    path = source.path if source.path.startswith("hf:") else os.path.realpath(os.path.expanduser(source.path))
    return dataclasses.replace(source, path=path, columns={**source.columns, **columns})


def _add(
    fresh: Sequence[IndexedImage],
    model: DualEncoder,
    engine: Backend,
    log: SkipLog,
    batch: int,
    workers: int | None,
) -> tuple[set[str], int]:
    """Put pictures into the index; the names of those that could be read, and how many contents were embedded."""
    kept: set[str] = set()
    embedded = 0
    for start in range(0, len(fresh), CHUNK):
        some, count = _add_chunk(fresh[start : start + CHUNK], model, engine, log, batch, workers)
        kept, embedded = kept | some, embedded + count
    return kept, embedded


def _add_chunk(
    fresh: Sequence[IndexedImage], model: DualEncoder, engine: Backend, log: SkipLog, batch: int, workers: int | None
) -> tuple[set[str], int]:
    kept: set[str] = set()
    waiting: dict[bytes, list[IndexedImage]] = defaultdict(list)  # by their bytes, which are not in the index yet

    def put(contents: list[IndexedContent], some: list[tuple[IndexedImage, bytes]]) -> None:
        engine.put(contents, some)
        kept.update(picture.name for picture, _ in some)

    read = [(p, *_digest(p, log)) for p in tqdm(fresh, desc="read", unit="picture")]
    dated = [(dataclasses.replace(p, taken=taken), digest) for p, digest, taken in read if digest]
    have = engine.have({digest for _, digest in dated})
    put([], [(p, digest) for p, digest in dated if digest in have])
    for picture, digest in dated:
        if digest not in have:
            waiting[digest].append(picture)
    digests = list(waiting)
    refs = [waiting[digest][0].place for digest in digests]
    embedded = 0
    with tqdm(total=len(refs), desc="embed", unit="picture", disable=not refs) as bar:
        for good, prepared, failures in image_batches(refs, PreparedImages(model.transform), batch, workers):
            vectors = model.encode_images([p for p, *_ in prepared]).numpy() if good else ()
            contents = []
            for i, vector, (_, small, width, height) in zip(good, vectors, prepared, strict=True):
                if np.isfinite(vector).all():
                    contents.append(IndexedContent(digests[i], vector.astype(np.float16), small, width, height))
                else:
                    failures[i] = "the model's vector of it is not finite"
            for i, reason in failures.items():
                for picture in waiting[digests[i]]:
                    log.skip(picture.name, 0, "undecodable image", reason)
            put(contents, [(picture, content.hash) for content in contents for picture in waiting[content.hash]])
            embedded += len(contents)
            bar.update(len(contents) + len(failures))
    return kept, embedded


def _digest(picture: IndexedImage, log: SkipLog) -> tuple[bytes | None, float]:
    """SHA-256 of a picture's bytes, and when it was taken; None if they cannot be read."""
    try:
        data = picture.place.read()
    except (OSError, ValueError, LookupError) as error:
        log.skip(picture.name, 0, "unreadable image", error)
        return None, 0.0
    return hashlib.sha256(data).digest(), date_taken(data) or picture.taken


def date_taken(data: bytes) -> float | None:
    """When a camera says that it took a picture, in seconds since 1970 (of a time zone it says nothing: it is taken for
    this machine's)."""
    try:
        header = Image.open(io.BytesIO(data), formats=readable_formats())
        if header.format == "PNG" and "exif" not in header.info:
            return None  # or Pillow decodes the whole picture to look behind it
        exif = header.getexif()
        written = exif.get_ifd(EXIF).get(DATE_TAKEN) or exif.get(DATE)
        return datetime.strptime(str(written)[:19], "%Y:%m:%d %H:%M:%S").timestamp()
    except Exception:  # hostile headers make Pillow raise almost anything; a date is no reason to leave a picture out
        return None


@dataclass(frozen=True)
class PreparedImages:
    """A decoded picture to what the model takes, a thumbnail (JPEG), its width and its height."""

    transform: Callable[[Tensor], Any]

    def __call__(self, image: Tensor) -> tuple[Any, bytes, int, int]:
        height, width = image.shape[-2:]
        return self.transform(image), make_thumbnail(image, THUMBNAIL), width, height
