"""Captioning runs, which request captions for source images and write records with the captions.

A run lists and hashes the images, requests the missing captions, checks all captions, and writes the accepted captions.
"""

from __future__ import annotations

import hashlib
import math
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.caption.answers import Answer, CaptioningStoppedError, CaptionRequest
from llm2clip.caption.checks import check_captions, find_image_file, score_captions
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.files import (
    CaptionOutputPaths,
    CaptionReport,
    build_caption_report_blocks,
    describe_caption_results,
    read_source_image_rows,
    write_caption_report,
    write_captioned_records,
    write_failed_requests,
)
from llm2clip.caption.options import CaptionOptions, Prompt, load_prompts
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.image_facts import UNREADABLE_IMAGE
from llm2clip.data.images import ImageError, load_image, shrink_image
from llm2clip.data.skip_log import MAX_VALUE_CHARACTERS, SkipLog, TooManySkippedError
from llm2clip.io_utils import format_count, require_extra
from llm2clip.parallel import Prefetcher
from llm2clip.progress import ProgressBar
from llm2clip.reports import render_plain_text
from llm2clip.runs.output_folder import hold_folder_lock
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone

if TYPE_CHECKING:
    from llm2clip.caption.captioners import Captioner
    from llm2clip.models.dual_encoder import DualEncoder

POLL_INTERVAL = 0.1  # maximum delay until a signal is handled, in seconds

OpenEncoder = Callable[[], "DualEncoder"]


def run_captioning(sources: Sequence[str], out: Path, model: str, options: CaptionOptions) -> list[str]:
    """Write captions for all images in the sources to the JSONL file `out`. Return lines to print.

    Args:
        model: Name of the model on the server, or a model folder or hub id if `options.endpoint` is not set.

    Raises the same exceptions as `caption_images`.
    """
    require_extra("caption", "captioning")  # fails before captioning if py3langid is not installed
    from llm2clip.caption.captioners import EndpointCaptioner, LocalCaptioner

    CaptionOutputPaths(out).check_records_path()
    prompts = load_prompts(options.prompts, options.language, options.use_captions)
    open_encoder = None
    if options.check is not None:
        from llm2clip.models.dual_encoder import open_dual_encoder

        open_encoder = partial(open_dual_encoder, options.check, process_state().device)
        if process_state().is_main_process:  # fails before captioning if the encoder is invalid
            open_encoder()
            free_memory()
    if options.endpoint is None:
        captioner: Captioner = LocalCaptioner(model, options.batch_size)
    else:
        if process_state().num_processes > 1:
            raise ValueError(
                "--endpoint requires a single process. Run the command without torchrun, and set the number of "
                "concurrent requests with --concurrency"
            )
        endpoint = EndpointCaptioner(options.endpoint, model, options.concurrency, options.retries, options.timeout)
        print_once(*endpoint.describe_endpoint())
        captioner = endpoint
    return caption_images(sources, out, captioner, prompts, options, open_encoder)


def caption_images(
    sources: Sequence[str],
    out: Path,
    captioner: Captioner,
    prompts: Sequence[Prompt],
    options: CaptionOptions,
    open_encoder: OpenEncoder | None = None,
) -> list[str]:
    """Write captions for all images in the sources to a JSONL file. Return lines to print. Must be called by all ranks.

    Captions that are already in the database are not requested again, so an interrupted run can be resumed, and later
    runs can add images.

    Args:
        open_encoder: Function that opens the dual encoder for comparing captions with their images. The main process
            calls it after all captions have been requested.

    Raises:
        KeyboardInterrupt: The process received SIGINT or SIGTERM. All received answers have been stored.
        TooManySkippedError: More than `options.max_skipped` of the images are unreadable, or have no caption because
            requests failed.
        ValueError: The server rejects all requests, another rank was interrupted, or no image has an accepted caption.
        FolderInUseError: Another run is writing to the same output file.
    """
    output = CaptionOutputPaths(out)
    output.check_records_path()
    is_main = process_state().is_main_process
    with hold_folder_lock(out.parent, f".{out.name}.lock") if is_main else nullcontext():
        log = SkipLog(output.skipped if is_main else None, options.max_skipped)
        if is_main:
            with (
                closing(CaptionDatabase(output.database)) as database,
                closing(CaptionDatabase(output.database)) as earlier,  # reads rows of the previous run
            ):
                database.replace_image_rows(read_source_image_rows(sources, options.columns, output, log, earlier))
                if not database.count_images():
                    raise ValueError(f"there are no images to caption: {log.summary()}")
        wait_for_everyone()
        with closing(CaptionDatabase(output.database)) as database:
            run = _CaptionRun(output, captioner, prompts, options, database)
            lines: list[str] = []
            try:
                with _stop_on_signals(run):
                    run.request_missing_captions()
            finally:
                if sys.exception() is None:  # after an exception, torchrun stops the other ranks
                    wait_for_everyone()
                if is_main and not isinstance(sys.exception(), KeyboardInterrupt):  # unless Ctrl-C was pressed twice
                    was_completed = (
                        sys.exception() is None and not run.was_interrupted and not run.count_missing_captions()
                    )
                    lines = _check_and_write_captions(run, sources, log, open_encoder if was_completed else None)
            if is_main and not run.was_interrupted:
                _check_missing_captions(run)
            wait_for_everyone()
            if run.was_interrupted:
                raise KeyboardInterrupt
    return lines


def _check_and_write_captions(
    run: _CaptionRun, sources: Sequence[str], log: SkipLog, open_encoder: OpenEncoder | None
) -> list[str]:
    """Check all captions, and write the output files before and after the comparison with images, which can fail."""
    database, model, prompts = run.database, run.captioner.name, run.prompts
    checks = check_captions(database, model, prompts, run.options.language)
    report = CaptionReport(sources, model, prompts, checks, seconds=run.elapsed_seconds)
    lines = _write_output_files(run, report, log)
    if open_encoder is not None:
        scores = score_captions(database, model, prompts, open_encoder(), run.options.check_max_rank)
        lines = _write_output_files(run, replace(report, scores=scores, seconds=run.elapsed_seconds), log)
    return lines


def _write_output_files(run: _CaptionRun, report: CaptionReport, log: SkipLog) -> list[str]:
    database, output, model, prompts = run.database, run.output, report.model, report.prompts
    num_records, num_captions = write_captioned_records(database, output.records, model, prompts)
    num_failures = write_failed_requests(database, output.failures, model, prompts)
    write_caption_report(output.report, database, report)
    lines = [
        render_plain_text(build_caption_report_blocks(database, report), describe_caption_results(database, report)),
        "",
    ]
    num_images = database.count_images()
    _, num_rejected = database.count_images_without_caption(model, prompts)
    if num_rejected > run.options.max_skipped * num_images:
        lines.append(
            f"Warning: no caption for {num_rejected:,} of {format_count(num_images, 'image')}, because quality control "
            "rejected all captions of these images\n"
        )
    captions = format_count(num_captions, "caption")
    lines += [
        f"Captions: {output.records} ({captions} of {format_count(num_records, 'record')})",
        f"Report: {output.report}",
        log.summary(),
    ]
    if num_failures:
        lines.append(
            f"Failed requests: {num_failures:,}, listed in {output.failures}. To retry, run the same command again"
        )
    return lines


def _check_missing_captions(run: _CaptionRun) -> None:
    if num_missing := run.count_missing_captions():  # a rank does not know whether other ranks were interrupted
        raise ValueError(
            f"another process was stopped. Captions that have not been requested: {num_missing:,}. All other captions "
            "are stored. To request the missing captions, run the same command again"
        )
    num_failed, num_rejected = run.database.count_images_without_caption(run.captioner.name, run.prompts)
    num_images = run.database.count_images()
    if num_failed > run.options.max_skipped * num_images:
        _, num_requests, example = run.database.count_errors_by_reason(run.captioner.name, run.prompts, limit=1)[0]
        raise TooManySkippedError(
            f"no caption for {num_failed:,} of {format_count(num_images, 'image')} because requests failed, over the "
            f"limit of {run.options.max_skipped:.1%}. Most common reason, for {format_count(num_requests, 'request')}: "
            f"{example[:MAX_VALUE_CHARACTERS]}\nAll failed requests are listed in {run.output.failures}. To retry, run "
            "the same command again. To accept more images without captions, raise the limit with --max_skipped"
        )
    if num_failed + num_rejected == num_images:
        raise ValueError(
            f"no image has an accepted caption. Images whose captions were rejected by quality control: "
            f"{num_rejected:,}. Images whose requests failed: {num_failed:,}. The reasons are listed in "
            f"{run.output.report}. Use another model or other prompts"
        )


# ---- request captions ------------------------------------------------------------------------------------------------


class _CaptionRun:
    """Captioning run in which one thread reads the images, and other threads call the captioner.

    Each thread stores its answers before it sends the next requests. If the process is killed, each thread loses at
    most one batch of answers.
    """

    def __init__(
        self,
        output: CaptionOutputPaths,
        captioner: Captioner,
        prompts: Sequence[Prompt],
        options: CaptionOptions,
        database: CaptionDatabase,
    ) -> None:
        self.output, self.captioner, self.prompts = output, captioner, prompts
        self.options, self.database = options, database
        self._captions_per_image = sum(prompt.samples for prompt in prompts)
        self._started_at = time.monotonic()
        self.was_interrupted = False  # True after the first SIGINT or SIGTERM
        self._stopped = threading.Event()
        self._error: BaseException | None = None  # first error raised in a thread that calls the captioner
        self._lock = threading.Lock()  # protects the database and the progress bar
        self._batches_lock = threading.Lock()

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._started_at

    def request_missing_captions(self) -> None:
        state, model = process_state(), self.captioner.name
        num_stored = self.database.count_answers(model, self.prompts, only_captions=True)
        num_missing = self.database.count_images() * self._captions_per_image - num_stored
        self.captioner.worked_before = num_stored > 0
        if not num_missing:
            return
        total = num_stored + math.ceil(num_missing / state.num_processes)
        is_main = state.is_main_process
        with (
            ProgressBar(total=total, initial=num_stored, desc="caption", unit="caption", disable=not is_main) as bar,
            closing(Prefetcher(self._iterate_request_batches(), depth=max(2, self.captioner.workers))) as batches,
        ):
            threads = []
            for _ in range(self.captioner.workers):  # daemon threads do not delay the exit after a second Ctrl-C
                threads.append(threading.Thread(target=self._process_request_batches, args=(batches, bar), daemon=True))
                threads[-1].start()
            for thread in threads:
                while thread.is_alive():  # Python handles signals only between calls to join
                    thread.join(POLL_INTERVAL)
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Stop sending requests. Answers to requests that have already been sent are still stored."""
        self._stopped.set()
        self.captioner.stop()

    def count_missing_captions(self) -> int:
        num_answers = self.database.count_answers(self.captioner.name, self.prompts)
        return self.database.count_images() * self._captions_per_image - num_answers

    def _iterate_request_batches(self) -> Generator[list[CaptionRequest]]:
        """Yield batches of requests with the same prompt until the run is stopped."""
        state = process_state()
        batches: dict[str, list[CaptionRequest]] = defaultdict(list)
        with closing(CaptionDatabase(self.output.database)) as database:  # separate connection for the reading thread
            for row in database.iterate_image_rows(distinct=True):
                if self._stopped.is_set():
                    return
                if int(row.hash[:8], 16) % state.num_processes != state.process_index:
                    continue
                for request in self._make_caption_requests(row, database):
                    batch = batches[request.prompt.key]
                    batch.append(request)
                    if len(batch) >= self.captioner.batch_size:
                        yield batches.pop(request.prompt.key)
        yield from batches.values()

    def _make_caption_requests(self, row: ImageRow, database: CaptionDatabase) -> list[CaptionRequest]:
        """Return the requests for an image's missing captions. If the image is unreadable, store the error instead."""
        captions = row.record.get("captions") if self.options.use_captions else None
        caption = captions[0] if captions else None
        answers = database.list_answers(row.hash, self.captioner.name, self.prompts)
        stored = {(answer.prompt, answer.sample) for answer in answers if answer.error is None}
        missing = []
        for prompt in self.prompts:
            missing += [(prompt, sample) for sample in range(prompt.samples) if (prompt.key, sample) not in stored]
        if not missing:
            return []
        prepared, failure = None, None
        try:
            data = find_image_file(database, row).read()
            if hashlib.sha256(data).hexdigest() != row.hash:
                raise OSError("the file was changed during the run")
            prepared = self.captioner.prepare_image(shrink_image(load_image(data), self.options.image_size))
        except (ImageError, OSError) as error:
            failure = Answer(None, f"{UNREADABLE_IMAGE}: {error}")
        requests = [CaptionRequest(prepared, prompt, row.hash, sample, caption) for prompt, sample in missing]
        if failure is None:
            return requests
        with self._lock:
            self.database.add_answers([self._make_stored_answer(request, failure) for request in requests])
        return []

    def _process_request_batches(self, batches: Iterator[list[CaptionRequest]], bar: ProgressBar) -> None:
        """Request captions and store the answers. All threads share `batches`. An error stops the run."""
        try:
            while batch := self._get_next_request_batch(batches):
                answers = self.captioner.generate_answers(batch)
                rows = [self._make_stored_answer(*pair) for pair in zip(batch, answers, strict=True)]
                with self._lock:
                    self.database.add_answers(rows)
                    bar.total = max(bar.total or 0, bar.n + len(rows))  # with several ranks, the total is an estimate
                    bar.update(len(rows))
        except CaptioningStoppedError:
            pass
        except BaseException as error:
            self._error = self._error or error
            self.stop()

    def _get_next_request_batch(self, batches: Iterator[list[CaptionRequest]]) -> list[CaptionRequest] | None:
        with self._batches_lock:
            batch = next(batches, None)
        return None if self._stopped.is_set() else batch

    def _make_stored_answer(self, request: CaptionRequest, answer: Answer) -> StoredAnswer:
        prompt = request.prompt
        return StoredAnswer(
            hash=request.image_hash,
            prompt=prompt.key,
            sample=request.sample,
            model=self.captioner.name,
            text=answer.text,
            error=answer.error,
            temperature=prompt.temperature,
            date=datetime.now(UTC).date().isoformat(),
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
        )


@contextmanager
def _stop_on_signals(run: _CaptionRun) -> Iterator[None]:
    """Stop the run at the first SIGINT or SIGTERM. The previous handlers receive the second signal."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore_signal_handlers() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle_stop_signal(*_: Any) -> None:
        restore_signal_handlers()
        run.was_interrupted = True
        run.stop()
        print("\nStopping. Waiting for the answers to requests in flight.", file=sys.stderr)

    for number in previous:
        signal.signal(number, handle_stop_signal)
    try:
        yield
    finally:
        restore_signal_handlers()
