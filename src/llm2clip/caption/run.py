"""Captioning runs: read the images of the sources, ask a model for captions, and write records with these captions.

A run for OUT = captions.jsonl writes these files next to each other:

    captions.jsonl             records with the captions
    captions.jsonl.sqlite      all answers; see `database.py`. It makes the run resumable
    captions_failures.jsonl    requests without a caption, with their reason. They are retried by the next run
    captions_report.html       what quality control has found, with images and captions, worst first
    captions_skipped.jsonl     images that could not be read when they were listed
    captions_images/           copies of the images that are not files: members of tars, cells of tables, URLs

The first pass over the sources lists and hashes the images, and the second one asks for the missing captions. Then all
captions are checked, and those with a problem are not written. The output of captioning runs is not read as a source.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llm2clip.caption.answers import Answer, Captioner, CaptionRequest, StoppedError
from llm2clip.caption.checks import check_captions, find_image_file, remove_opening, score_captions
from llm2clip.caption.database import AnswerKey, CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.prompts import CAPTION_FIELD, Prompt
from llm2clip.caption.report import CaptionReport, format_report, write_report
from llm2clip.data.columns import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.formats import find_files
from llm2clip.data.image_facts import UNREADABLE_IMAGE
from llm2clip.data.image_header import DecodingLimitError, ImageFormatError, open_header
from llm2clip.data.image_refs import FileImage, ImageRef, get_file_version
from llm2clip.data.images import ImageError, load_image, shrink_image
from llm2clip.data.records import Record, RecordReader, Source
from llm2clip.data.remote import is_remote
from llm2clip.data.skip_log import MAX_VALUE_CHARACTERS, SkipLog, TooManySkipped
from llm2clip.io_utils import atomic_path, explain_write_errors
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import FolderInUseError, folder_lock
from llm2clip.runs.ranks import process_state, wait_for_everyone

POLL_INTERVAL = 0.1  # seconds between checks of the stop signal
_COPIED_IMAGE = re.compile(r"[0-9a-f]{64}\.\w+")
WRITTEN_BY_CAPTION = "not read, because `llm2clip caption` has written it"


@dataclass(frozen=True)
class CaptionOutput:
    """Paths of a captioning run's files. They are derived from the path of the output, which must end with .jsonl."""

    records: Path

    @property
    def database(self) -> Path:
        return self.records.with_name(f"{self.records.name}.sqlite")

    @property
    def failures(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_failures.jsonl")

    @property
    def report(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_report.html")

    @property
    def skipped(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_skipped.jsonl")

    @property
    def images(self) -> Path:
        return self.records.with_name(f"{self.records.stem}_images")

    def check(self) -> None:
        """Raise ValueError if the path is not valid, or if the file was not written by a captioning run."""
        if self.records.suffix.lower() != ".jsonl":
            raise ValueError(f"--out must be a .jsonl file (got {self.records})")
        if self.records.exists() and not self.database.exists():
            raise ValueError(
                f"--out {self.records} already exists, and was not written by `llm2clip caption`, because "
                f"{self.database.name} does not exist. Choose another file"
            )


def _is_caption_output(path: str) -> bool:
    """Return True if a local file was written by a captioning run."""
    return path.endswith(".jsonl") and not is_remote(path) and os.path.exists(f"{path}.sqlite")


def _is_copied_image(image: str) -> bool:
    """Return True if an image was copied by a captioning run. Its name consists of its hash and a suffix."""
    folder, name = os.path.split(image)
    return _COPIED_IMAGE.fullmatch(name) is not None and _is_images_folder(folder)


@cache
def _is_images_folder(folder: str) -> bool:
    """Return True if a captioning run copies images to a folder. It can also contain other images."""
    return folder.endswith("_images") and _is_caption_output(f"{folder.removesuffix('_images')}.jsonl")


@dataclass(frozen=True)
class CaptionSettings:
    """Settings of a captioning run.

    Attributes:
        columns: Mapping from fields to columns of the sources; see `Source`.
        max_skipped: Maximum fraction of images that may be unreadable, and of images without any caption because
            their requests failed.
        use_captions: Give the captions in the sources to the model, in prompts with {caption}.
        image_size: Images are shrunk to at most this number of pixels per side.
        max_cost: Stop when the answers have cost this amount.
        price: Price of a million input tokens and of a million output tokens.
        language: Language of the captions. Captions in other languages are rejected. Default: the language of most
            captions.
        max_rank: Captions that fit more than this fraction of other images better are rejected; see `score_captions`.
    """

    columns: dict[str, str]
    max_skipped: float = 0.05
    use_captions: bool = False
    image_size: int = 768
    max_cost: float | None = None
    price: tuple[float, float] | None = None
    language: str | None = None
    max_rank: float = 0.25

    def compute_cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the cost of tokens, or 0 if no price is known."""
        input_price, output_price = self.price or (0.0, 0.0)
        return (input_tokens * input_price + output_tokens * output_price) / 1e6


@dataclass(frozen=True)
class CaptionSummary:
    """Result of a captioning run: numbers of records written, of captions and of failed requests, and the report."""

    records: int
    captions: int
    failures: int
    report: str  # tables of the report as text, and a warning if too many images have only rejected captions
    skipped: str  # summary of the skip log


def caption_images(
    sources: Sequence[str],
    out: Path,
    captioner: Captioner,
    prompts: Sequence[Prompt],
    settings: CaptionSettings,
    open_encoder: Callable[[], DualEncoder] | None = None,
) -> CaptionSummary:
    """Write captions for all images in the sources to a JSONL file. Must be called by all ranks.

    Captions that the database already contains are not requested again, so an interrupted run can be resumed, and
    images can be added.

    Args:
        open_encoder: Function that opens the dual encoder that compares the captions with their images. It is called
            on the main process when all captions have been requested.

    Raises:
        KeyboardInterrupt: The process received SIGINT or SIGTERM. All answers have been stored and written.
        TooManySkipped: More than `settings.max_skipped` of the images cannot be read, or have no caption because their
            requests failed. All answers have been stored and, in the second case, written.
        ValueError: The server rejects all requests, the cost limit is reached, another rank was interrupted, or no
            image has an accepted caption. All answers have been stored and written.
        FolderInUseError: Another run is writing to the same file.
    """
    output = CaptionOutput(out)
    output.check()
    is_main = process_state().is_main_process
    with _output_lock(out) if is_main else nullcontext():
        log = SkipLog(output.skipped if is_main else None, settings.max_skipped)
        if is_main:
            with (
                closing(CaptionDatabase(output.database)) as database,
                closing(CaptionDatabase(output.database)) as earlier,  # sees the old images until the transaction ends
            ):
                database.replace_images(_list_images(sources, output, settings, log, earlier))
        wait_for_everyone()
        with closing(CaptionDatabase(output.database)) as database:
            run = _CaptionRun(sources, output, captioner, prompts, settings, log, database)
            summary = None
            try:
                with _stop_on_signals(run):
                    run.ask_all()
            finally:
                if sys.exception() is None:  # otherwise, torchrun stops the other processes
                    wait_for_everyone()
                if is_main and not isinstance(sys.exception(), KeyboardInterrupt):  # not at the second Ctrl+C
                    was_completed = sys.exception() is None and not run.was_interrupted and not run.count_missing()
                    summary = _write_output(run, open_encoder if was_completed else None)
            if is_main and not run.was_interrupted:
                _check_missing(run)
                _check_failures(run)
            wait_for_everyone()
            if run.was_interrupted:
                raise KeyboardInterrupt
    return summary or CaptionSummary(0, 0, 0, "", log.summary())


def _write_output(run: _CaptionRun, open_encoder: Callable[[], DualEncoder] | None) -> CaptionSummary:
    """Check all captions, then write the records, the failed requests and the report.

    They are written before the comparison with the images, which can fail, and again after it.
    """
    database, model, prompts, settings = run.database, run.captioner.name, run.prompts, run.settings
    report = CaptionReport(
        sources=run.sources,
        model=model,
        prompts=prompts,
        checks=check_captions(database, model, prompts, settings.language),
        max_rank=settings.max_rank,
        cost=settings.compute_cost(*database.count_tokens(model)) if settings.price else None,
        seconds=time.monotonic() - run.started_at,
    )
    summary = _write_files(run, report)
    if open_encoder is None:
        return summary
    encoder = open_encoder()
    scores = score_captions(database, model, prompts, encoder, settings.max_rank)
    seconds = time.monotonic() - run.started_at
    return _write_files(run, replace(report, scores=scores, encoder=encoder.name, seconds=seconds))


def _write_files(run: _CaptionRun, report: CaptionReport) -> CaptionSummary:
    """Write the records, the failed requests and the report."""
    database, output, model, prompts = run.database, run.output, run.captioner.name, run.prompts
    num_records, num_captions = write_records(database, output, model, prompts)
    num_failures = write_failures(database, output, model, prompts)
    write_report(output.report, database, report)
    text = format_report(database, report)
    num_images = database.count_images()
    _, num_rejected = database.count_images_without_caption(model, prompts)
    if num_rejected > run.settings.max_skipped * num_images:
        text += (
            f"\n\nWarning: {num_rejected:,} of {num_images:,} images have no caption, because quality control has "
            "rejected all of their captions"
        )
    return CaptionSummary(num_records, num_captions, num_failures, text, run.log.summary())


def _check_missing(run: _CaptionRun) -> None:
    """Raise ValueError if captions have not been requested. Each rank only knows whether it was interrupted itself."""
    if num_missing := run.count_missing():
        raise ValueError(
            f"{num_missing:,} captions have not been requested, because another process was stopped. The other "
            "captions are stored. To request the missing ones, run the same command again"
        )


def _check_failures(run: _CaptionRun) -> None:
    """Raise an error if too many images have no caption because all their requests failed, or if no image has one."""
    num_failed, num_rejected = run.database.count_images_without_caption(run.captioner.name, run.prompts)
    num_images = run.database.count_images()
    if num_failed > run.settings.max_skipped * num_images:
        _, num_requests, example = run.database.count_errors(run.captioner.name, run.prompts, limit=1)[0]
        raise TooManySkipped(
            f"{num_failed:,} of {num_images:,} images have no caption because their requests failed, over the limit of "
            f"{run.settings.max_skipped:.1%}. The most common reason, for {num_requests:,} requests: "
            f"{example[:MAX_VALUE_CHARACTERS]}\nAll failed requests are listed in {run.output.failures}. To ask again, "
            "run the same command again. To accept images without captions, raise the limit with --max_skipped"
        )
    if num_failed + num_rejected == num_images:
        raise ValueError(
            f"none of the {num_images:,} images has a caption: quality control has rejected all captions of "
            f"{num_rejected:,} images, and all requests for {num_failed:,} images have failed. The reasons are in "
            f"{run.output.report}. Use another model or other prompts"
        )


# ---- list the images -------------------------------------------------------------------------------------


def _list_images(
    sources: Sequence[str], output: CaptionOutput, settings: CaptionSettings, log: SkipLog, earlier: CaptionDatabase
) -> Iterator[ImageRow]:
    """Yield a row for each record with an image. Copy images that are not local files to the images folder.

    Args:
        earlier: Database with the images of the last run. Unchanged files are not read again.
    """
    number = 0
    with ProgressBar(desc="read", unit="image") as bar:
        for source in sources:
            for record, image in _open_images(source, output, settings, log):
                key = _make_key(record, image)
                try:
                    if isinstance(image, FileImage) and not is_remote(image.path):
                        path = os.path.abspath(image.path)
                        image_hash, version = _hash_file(image, earlier.find_image(key))
                    else:
                        path, image_hash, version = *_copy_image(image.read(), output), None
                except (OSError, ImageFormatError, DecodingLimitError) as error:
                    log.skip(str(image), number, UNREADABLE_IMAGE, error)
                    continue
                path = path.removeprefix(os.path.join(os.path.abspath(output.records.parent), ""))
                yield ImageRow(number, key, image_hash, _make_record(record, path), version)
                number += 1
                bar.update()


def _open_images(
    source: str, output: CaptionOutput, settings: CaptionSettings, log: SkipLog
) -> Iterator[tuple[Record, ImageRef]]:
    """Yield the records of a source that have an image, and the image. The output of captioning runs is omitted."""
    parsed = Source.parse(source)
    parsed = Source(parsed.path, parsed.splits, settings.columns or parsed.columns)
    source_path = os.path.realpath(os.path.expanduser(parsed.path))
    # The output of another run is read if the user has named the file.
    omits_output = not os.path.isfile(source_path) or source_path == os.path.realpath(output.records)
    files = []
    for file in find_files(parsed.path, all_files=True, log=log):
        if omits_output and _is_caption_output(file.path):
            log.add_note(WRITTEN_BY_CAPTION, file.path)
        else:
            files.append(file)
    for number, record in enumerate(RecordReader(parsed, log, "header", require_captions=False).read(files)):
        if record.image is None:
            log.skip(parsed.path, number, "no image", record.id)
        elif omits_output and _is_copied_image(str(record.image)):
            log.add_note(WRITTEN_BY_CAPTION, os.path.dirname(str(record.image)))
        else:
            yield record, record.image


def _make_key(record: Record, image: ImageRef) -> str:
    """Return a string that identifies an image and its split. Invalid bytes in file names are escaped."""
    key = image.key if record.split is None else f"{image.key}@{record.split}"
    return key.encode(errors="backslashreplace").decode()


def _make_record(record: Record, path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"image": path, "id": record.id}
    for name in TEXT_FIELDS:
        if texts := getattr(record, name):
            fields[name] = list(texts)
    if record.split is not None:
        fields["split"] = record.split
    return fields


def _hash_file(image: FileImage, earlier: ImageRow | None) -> tuple[str, str]:
    """Return the hash and the version of an image file. It is read only if it has changed since the last run."""
    ((size, modified),) = get_file_version(image.path)
    version = f"{size} {modified}"
    if earlier is not None and earlier.version == version:
        return earlier.hash, version
    return hashlib.sha256(image.read()).hexdigest(), version


def _copy_image(data: bytes, output: CaptionOutput) -> tuple[str, str]:
    """Copy an image to the images folder if it is not there yet. Return its path and hash.

    Raises:
        OSError: The image cannot be copied.
        ImageFormatError: The format of the image is unknown.
    """
    image_hash = hashlib.sha256(data).hexdigest()
    image_format = (open_header(BytesIO(data)).format or "").lower()
    suffix = {"jpeg": "jpg", "mpo": "jpg", "heif": "heic"}.get(image_format, image_format)
    path = output.images.absolute() / f"{image_hash}.{suffix}"
    if not path.exists() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        with explain_write_errors(path):
            temporary.write_bytes(data)
            temporary.replace(path)
    return os.path.abspath(path), image_hash


# ---- ask for captions -----------------------------------------------------------------------------------


class _Item(NamedTuple):
    """A request, and the hash of its image."""

    hash: str
    request: CaptionRequest


class _CaptionRun:
    """Threads that ask for the missing captions: one reads the images, and the others call the captioner.

    An answer is stored by the thread that received it, before this thread asks for the next one. If the process is
    killed, at most one answer per thread is lost.

    Attributes:
        started_at: Time at which the run started, in seconds of `time.monotonic`.
        was_interrupted: True if the process received a signal to stop.
    """

    def __init__(
        self,
        sources: Sequence[str],
        output: CaptionOutput,
        captioner: Captioner,
        prompts: Sequence[Prompt],
        settings: CaptionSettings,
        log: SkipLog,
        database: CaptionDatabase,
    ) -> None:
        self.sources, self.output, self.captioner, self.prompts = sources, output, captioner, prompts
        self.settings, self.log, self.database = settings, log, database
        self.was_interrupted = False
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # for the database, the progress bar and the cost
        self._batches: queue.Queue[list[_Item] | None] = queue.Queue(maxsize=max(2, captioner.workers))
        self._num_answers = 0
        self.started_at = time.monotonic()
        self._cost = settings.compute_cost(*database.count_tokens(captioner.name))

    def ask_all(self) -> None:
        """Ask for all missing captions of this rank's images."""
        num_ranks = process_state().num_processes
        model = self.captioner.name
        num_stored = sum(self.database.count_captions(model, prompt.key, prompt.samples) for prompt in self.prompts)
        num_missing = self.database.count_images() * self._captions_per_image - num_stored
        self.captioner.worked_before = num_stored > 0
        if not num_missing and not self.settings.use_captions:  # otherwise, a caption in the source may have changed
            return
        total = num_stored + math.ceil(num_missing / num_ranks)
        is_main = process_state().is_main_process
        with ProgressBar(total=total, initial=num_stored, desc="caption", unit="caption", disable=not is_main) as bar:
            threads = [threading.Thread(target=self._run, args=(self._read_images,), daemon=True)]
            for _ in range(self.captioner.workers):
                threads.append(threading.Thread(target=self._run, args=(self._ask, bar), daemon=True))
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():  # signals are handled between two calls of join
                    thread.join(POLL_INTERVAL)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop asking. Answers to requests that have been sent are still stored."""
        self._stopped.set()
        self.captioner.stop()

    def count_missing(self) -> int:
        """Return the number of captions that no rank has requested."""
        return self.database.count_missing_answers(self.captioner.name, self.prompts)

    @property
    def _captions_per_image(self) -> int:
        return sum(prompt.samples for prompt in self.prompts)

    def _run(self, function: Callable[..., None], *args: Any) -> None:
        """Run a function in a thread. If it raises an exception, stop the run."""
        try:
            function(*args)
        except StoppedError:
            pass
        except BaseException as error:
            self._error = self._error or error
            self.stop()

    # ---- thread that reads the images

    def _read_images(self) -> None:
        """Put batches of requests with the same prompt into the queue, then None for each worker."""
        batches: dict[str, list[_Item]] = defaultdict(list)
        for item in self._iterate_requests():
            batch = batches[item.request.prompt.key]
            batch.append(item)
            if len(batch) == self.captioner.batch_size:
                self._put(batches.pop(item.request.prompt.key))
        for batch in batches.values():
            self._put(batch)
        for _ in range(self.captioner.workers):
            self._put(None)

    def _put(self, batch: list[_Item] | None) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                return self._batches.put(batch, timeout=POLL_INTERVAL)
        raise StoppedError

    def _iterate_requests(self) -> Iterator[_Item]:
        """Yield the missing requests of this rank's images."""
        state = process_state()
        with closing(CaptionDatabase(self.output.database)) as database:
            for row in database.iterate_distinct_images():
                if int(row.hash[:8], 16) % state.num_processes == state.process_index:
                    yield from self._make_requests(row, database)

    def _make_requests(self, row: ImageRow, database: CaptionDatabase) -> list[_Item]:
        """Return the missing requests of an image, or none if it cannot be read."""
        captions = row.record.get("captions") if self.settings.use_captions else None
        caption = captions[0] if captions else None
        answers = database.list_answers(row.hash, self.captioner.name, [prompt.key for prompt in self.prompts])
        stored = {(answer.prompt, answer.sample): answer.text_hash for answer in answers if answer.error is None}
        missing = []
        for prompt in self.prompts:
            for sample in range(prompt.samples):
                key = prompt.key, sample
                # Answers in databases of format 1 have no hash.
                if key not in stored or stored[key] not in (None, _hash_text(prompt, caption)):
                    missing.append((prompt, sample))
        if not missing:
            return []
        self._check_cost()
        image = find_image_file(database, row)
        try:
            data = image.read()
            if hashlib.sha256(data).hexdigest() != row.hash:
                raise OSError("the file was changed during the run")
            prepared = self.captioner.prepare(shrink_image(load_image(data), self.settings.image_size))
        except (ImageError, OSError) as error:
            failure = Answer(None, f"{UNREADABLE_IMAGE}: {error}")
            items = [_Item(row.hash, CaptionRequest(None, prompt, sample, caption)) for prompt, sample in missing]
            with self._lock:
                self.database.add_answers([self._make_answer(item, failure) for item in items])
            return []
        return [_Item(row.hash, CaptionRequest(prepared, prompt, sample, caption)) for prompt, sample in missing]

    # ---- threads that call the captioner

    def _ask(self, bar: ProgressBar) -> None:
        """Ask for the captions in the queue and store the answers."""
        while batch := self._take():
            with self._lock:
                self._check_cost()
            answers = self.captioner.ask([item.request for item in batch])
            rows = [self._make_answer(item, answer) for item, answer in zip(batch, answers, strict=True)]
            with self._lock:
                self.database.add_answers(rows)
                self._num_answers += len(rows)
                self._cost += sum(self.settings.compute_cost(row.input_tokens, row.output_tokens) for row in rows)
                bar.set_postfix_str(self._format_speed(), refresh=False)
                bar.total = max(bar.total or 0, bar.n + len(rows))  # an estimate for several ranks
                bar.update(len(rows))
                self._check_tokens(rows)

    def _make_answer(self, item: _Item, answer: Answer) -> StoredAnswer:
        """Return the row of the database for an answer."""
        prompt = item.request.prompt
        return StoredAnswer(
            *AnswerKey(item.hash, prompt.key, item.request.sample, self.captioner.name),
            text=answer.text,
            error=answer.error,
            temperature=prompt.temperature,
            date=datetime.now(UTC).date().isoformat(),
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            text_hash=_hash_text(prompt, item.request.caption),
        )

    def _take(self) -> list[_Item] | None:
        """Return the next batch, or None if there are no more batches or the run is stopped."""
        while not self._stopped.is_set():
            with suppress(queue.Empty):
                return self._batches.get(timeout=POLL_INTERVAL)
        return None

    def _check_cost(self) -> None:
        """Raise ValueError if the cost limit is reached. Must be called before a request."""
        if self.settings.max_cost is not None and self._cost >= self.settings.max_cost:
            raise ValueError(
                f"the captions have cost {self._cost:.2f}, and --max_cost is {self.settings.max_cost:g}. They are "
                "stored. To continue, run the same command again with a higher limit"
            )

    def _check_tokens(self, rows: Sequence[StoredAnswer]) -> None:
        """Raise ValueError if the cost of answers is unknown, but limited."""
        if self.settings.max_cost is None:
            return
        if any(row.error is None and not row.output_tokens for row in rows):
            raise ValueError("the server does not report the number of tokens, so --max_cost cannot be used")

    def _format_speed(self) -> str:
        minutes = (time.monotonic() - self.started_at) / 60
        speed = f"{self._num_answers / self._captions_per_image / minutes:.1f} images/min"
        return f"{speed}, cost {self._cost:.2f}" if self.settings.price else speed


def _hash_text(prompt: Prompt, caption: str | None) -> str | None:
    """Return a hash of a prompt with an image's caption, or None if the prompt does not contain {caption}."""
    if CAPTION_FIELD not in prompt.text:
        return None
    return hashlib.sha256(prompt.fill(caption).encode()).hexdigest()[:16]


@contextmanager
def _output_lock(out: Path) -> Iterator[None]:
    """Hold a lock on the output. Raise FolderInUseError if another run is writing to it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(out.parent, f".{out.name}.lock"))
        except FolderInUseError:
            raise FolderInUseError(f"another run is writing to {out}. Wait for it to finish") from None
        yield


@contextmanager
def _stop_on_signals(run: _CaptionRun) -> Iterator[None]:
    """Stop the run at the first SIGINT or SIGTERM. A second signal has its usual effect."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(*_: Any) -> None:
        restore()
        run.was_interrupted = True
        run.stop()
        print("\nStopping. Waiting for the answers to the requests that have been sent.", file=sys.stderr)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        restore()


# ---- output ----------------------------------------------------------------------------------------------------------


def write_records(
    database: CaptionDatabase, output: CaptionOutput, model: str, prompts: Sequence[Prompt]
) -> tuple[int, int]:
    """Write the records with their captions. Captions that quality control rejects are omitted.

    Returns:
        The number of records and the number of generated captions.
    """
    num_records = num_captions = 0
    samples = {prompt.key: prompt.samples for prompt in prompts}
    with _open_output(output.records) as stream:
        for row in database.iterate_images():
            answers = database.list_answers(row.hash, model, [prompt.key for prompt in prompts])
            accepted = [
                answer
                for answer in answers
                if answer.text is not None and answer.problem is None and answer.sample < samples[answer.prompt]
            ]
            record = add_captions(row, accepted, prompts, database.has_source_captions(row.hash))
            if any(record.get(name) for name in CAPTION_FIELDS):
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                num_records += 1
                num_captions += len(accepted)
    return num_records, num_captions


def add_captions(
    row: ImageRow, answers: Sequence[StoredAnswer], prompts: Sequence[Prompt], has_source_captions: bool
) -> dict[str, Any]:
    """Return an image's record with generated captions and their origin.

    Short captions are added to `captions`, or to `short_captions` if the image has captions in the sources, in this
    record or another one. Dense captions are added to `long_captions`.
    """
    record = dict(row.record)
    short_field = "short_captions" if has_source_captions else "captions"
    record.setdefault("captions", [])
    kinds = {prompt.key: prompt.kind for prompt in prompts}
    for answer in answers:
        field = short_field if kinds[answer.prompt] == "short" else "long_captions"
        record[field] = list(dict.fromkeys([*record.get(field, []), remove_opening(answer.text or "")]))
    if answers:
        temperatures = {answer.prompt: answer.temperature for answer in answers}
        record["caption_source"] = {
            "image_hash": row.hash,
            "model": answers[0].model,
            "prompts": list(temperatures),
            "temperature": list(temperatures.values()),
            "date": max(answer.date for answer in answers),
        }
    return record


def write_failures(database: CaptionDatabase, output: CaptionOutput, model: str, prompts: Sequence[Prompt]) -> int:
    """Write the requests without a caption and their reasons. Return their number. Without failures, write no file."""
    num_failures = 0
    samples = {prompt.key: prompt.samples for prompt in prompts}
    with _open_output(output.failures) as stream:
        for row in database.iterate_distinct_images():
            for answer in database.list_answers(row.hash, model, [prompt.key for prompt in prompts]):
                if answer.error is not None and answer.sample < samples[answer.prompt]:
                    failure = {"image": row.record["image"], "id": row.record["id"], "prompt": answer.prompt}
                    failure |= {"sample": answer.sample, "error": answer.error, "date": answer.date}
                    stream.write(json.dumps(failure, ensure_ascii=False) + "\n")
                    num_failures += 1
    if not num_failures:
        output.failures.unlink()
    return num_failures


@contextmanager
def _open_output(file: Path) -> Iterator[TextIO]:
    """Open a JSONL file for writing. It replaces the old file at the end."""
    with atomic_path(file) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        yield stream
