"""Training runs: `fit`, which runs all stages, and the commands `tune`, `embed` and `align`, which each run one stage.

These functions lock the output folder, read the data and run the stages in `stages.py`. Completed work is skipped, so
running the same command again resumes an interrupted run. `fit` writes a run directory with this layout:

    RUN/
      config.yaml            all settings; a resumed run must not change settings that affect the result
      data/                  record tables: captions, references to the images, phrases (see data/build_table.py)
      skipped.jsonl          rows and images that could not be used, with their file and row number
      skipped_tune.jsonl     the same for the sources in `tune.data` and `tune.text_pairs`
      tune/                  encoder/ (the tuned caption encoder), metrics.jsonl, cra_*.json, checkpoints/
      store/                 embeddings of all captions
      align/                 metrics.jsonl, evaluations.jsonl, checkpoints/, best/, features-*/ (if the tower is frozen)
      evaluate/              untrained.json and trained.json: retrieval metrics before and after `align`;
                             query_templates.json: templates for short queries, with retrieval metrics;
                             examples.json: held-out captions with the images that they retrieve
      durations.json         seconds spent in each stage, excluding interrupted attempts
      model/                 the trained model
      report.md, report.html
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from transformers.utils import cached_file

from llm2clip.config import AlignConfig, DistillConfig, EncoderConfig, EvaluateConfig, FitConfig
from llm2clip.data.build_table import open_table
from llm2clip.data.columns import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.pairs import TuningItem, read_tuning_sources
from llm2clip.data.phrase_table import add_phrases
from llm2clip.data.records import Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import DataSplits, read_splits
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.reporting.training import write_distill_report, write_fit_report
from llm2clip.io_utils import iterate_lines
from llm2clip.models.export.model_card import write_model_card
from llm2clip.models.hub.loading import check_model_source
from llm2clip.models.hub.pretrained import resolve_gguf, resolve_pretrained
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import find_model_folder
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.checkpoint import latest_checkpoint
from llm2clip.runs.output_folder import run_lock, save_or_check_config
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone
from llm2clip.runs.run_description import StageClock
from llm2clip.stages import align, embed, evaluate, open_encoder, tune
from llm2clip.store.layout import check_identity
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.clip_finetuning import finetune_clip
from llm2clip.train.distill import (
    DistillTexts,
    Teacher,
    build_student_model,
    distill,
    iterate_captions,
    iterate_phrases,
    list_token_texts,
    open_student,
    prepare_texts,
)
from llm2clip.train.initial_model import PretrainedParts, load_pretrained_parts
from llm2clip.train.losses import get_loss
from llm2clip.train.monitoring import make_tracker_options
from llm2clip.train.sampling import resolve_images_per_step

# The folder of a caption encoder or LLM contains at least one of these files.
ENCODER_FILES = ("config.json", "modules.json", "adapter_config.json", "text/modules.json")

# Function that is called before training, with the settings, the run directory and the training records. It returns
# warnings to print. If the data is written first, it is also called before that, with None instead of the records.
CheckResources = Callable[[FitConfig, Path, RecordTable | None], list[str]]


def fit(
    sources: Sequence[str],
    run_dir: Path,
    config: FitConfig,
    check_resources: CheckResources | None = None,
    write_data: Callable[[], None] | None = None,
) -> Path:
    """Run all stages on captioned images.

    Args:
        sources: Data sources, each in the form PATH or PATH@split+split (see `llm2clip.data.records.Source`).
        run_dir: Run directory. If it contains an interrupted run, that run is resumed.
        check_resources: See `CheckResources`.
        write_data: Function that writes the sources. It is called after all checks that need no data.

    Returns:
        The model folder.

    Raises:
        ConfigChangedError: The run directory was created with different settings.
        TooManySkipped: The fraction of unusable rows exceeds `config.max_skipped`.
        ValueError: The data set is too small for the settings, or contains no captions to train on.
        FolderInUseError: Another run is writing to the run directory. The directory is left unchanged.
    """
    parts = None
    if not (run_dir / "model").exists():
        _check_loss_and_trackers(config.align)
        parts = load_pretrained_parts(config.align)
        if not (run_dir / "tune/encoder").exists():
            check_encoder(config.encoder)
    with run_lock(run_dir):
        if write_data is not None:
            if check_resources is not None and process_state().is_main_process:
                check_resources(config, run_dir, None)
            write_data()
        return _run_stages(sources, run_dir, config, parts, check_resources)


def _run_stages(
    sources: Sequence[str],
    run_dir: Path,
    config: FitConfig,
    parts: PretrainedParts | None,
    check_resources: CheckResources | None,
) -> Path:
    """Run the stages of `fit`. `parts` is None if the model is already trained."""
    log = start_run(run_dir, {"data": list(sources), **dataclasses.asdict(config)}, config.max_skipped)
    data = read_training_data(sources, config, log, folder=run_dir / "data")
    # A resumed run keeps its number of images per step.
    if latest_checkpoint(run_dir / "align" / "checkpoints") is None:
        resolve_images_per_step(int(data.train.has_image.sum()), config.align, process_state().num_processes)
    if parts is not None and check_resources is not None and process_state().is_main_process:
        print_once(*check_resources(config, run_dir, data.train))

    clock = StageClock(run_dir)
    clock.start("1/4 tune: contrastive training of the language model on captions")
    pairs = _read_fit_tuning_pairs(data.train, data.held_out, config, run_dir)
    held_out_captions = data.held_out["captions"].column("captions").to_pylist()
    encoder = EncoderConfig(path=str(tune(pairs, run_dir / "tune", config.encoder, config.tune, held_out_captions)))

    clock.start("2/4 embed: encoding every caption into the store")
    train_texts = data.train.iterate_texts(TEXT_FIELDS if config.align.uses_phrases else CAPTION_FIELDS)
    held_out_texts = (table.iterate_texts(CAPTION_FIELDS) for table in data.held_out.values())
    store = embed(chain(train_texts, *held_out_texts), run_dir / "store", encoder, config.embed)

    clock.start("3/4 align: training the vision tower against the store")
    model_dir = align(
        data.train,
        store,
        run_dir / "align",
        config.align,
        log,
        data.held_out,
        encoder,
        model_dir=run_dir / "model",
        parts=parts,
    )

    clock.start("4/4 evaluate: retrieval on held-out images")
    trained = evaluate(model_dir, data.held_out, run_dir / "evaluate", log, store)
    clock.stop()
    if process_state().is_main_process:
        write_fit_report(run_dir, trained, f"{data.summary}. {log.summary()}.")
        write_model_card(model_dir, run_dir.resolve().name)
    return model_dir


def run_tune(sources: Sequence[str], out: Path, config: FitConfig) -> Path:
    """Run the `tune` stage on captions and text pairs.

    Args:
        sources: Caption sources. Unless every source selects splits, captions of images that `fit` would hold out are
            excluded.
        config: Settings. The settings of other stages are ignored.

    Returns:
        The folder of the tuned caption encoder.

    Raises:
        ValueError: There are no captions or text pairs to tune on.
    """
    with run_lock(out):
        is_done = (out / "encoder").exists()
        if not is_done:
            check_encoder(config.encoder)
        settings = {"data": list(sources), "columns": config.columns, "encoder": config.encoder, "tune": config.tune}
        log = start_run(out, settings, config.max_skipped)
        pairs = [] if is_done else _read_tuning_pairs(sources, config, log)
        return tune(pairs, out, config.encoder, config.tune)


def run_embed(
    sources: Sequence[str],
    out: Path,
    config: FitConfig,
    *,
    phrases: bool = True,
    engine: Literal["local", "ray"] = "local",
    ray_workers: int = 0,
) -> EmbeddingStore:
    """Run the `embed` stage on all captions in the data sources.

    Args:
        out: Folder of the embedding store.
        config: Settings. The settings of other stages are ignored.
        phrases: If True, also encode short phrases from the captions.
        engine, ray_workers: See `stages.embed`.
    """
    with run_lock(out):
        log = _open_skip_log(out / "skipped.jsonl", config.max_skipped)
        records = open_table(sources, config.columns, log, "ignore")
        if phrases:
            records = add_phrases(records)
        texts = records.iterate_texts(TEXT_FIELDS if phrases else CAPTION_FIELDS)
        store = embed(texts, out, config.encoder, config.embed, engine=engine, ray_workers=ray_workers)
        print_once(log.summary())
        return store


def run_align(
    sources: Sequence[str], out: Path, config: FitConfig, store_dir: str | None, features: Path | None = None
) -> Path:
    """Run the `align` stage on captioned images, or fine-tune both towers of a CLIP model as a baseline.

    Args:
        sources: Data sources. Unless every source selects splits, images that `fit` would hold out are excluded.
        config: Settings. The model is evaluated during training only if `config.evaluate.data` lists sources.
        store_dir: Store of caption embeddings. If None, both towers of the CLIP model `config.align.tower` are
            fine-tuned instead.
        features: See `stages.align`.

    Returns:
        The model folder.
    """
    held_out = config.evaluate.data
    if store_dir is None and (held_out or features):
        raise ValueError("--own_text_tower cannot be combined with --held_out or --features. Omit these options")
    settings: dict[str, Any] = {"data": list(sources), "held_out": held_out, "columns": config.columns}
    settings |= {"store": store_dir, "encoder": config.encoder, "align": config.align}
    with run_lock(out):
        log = start_run(out, settings, config.max_skipped)
        if (out / "model").exists():
            return out / "model"
        _check_loss_and_trackers(config.align)
        if store_dir is None:
            data = read_training_data(sources, config, log, keep_selected_splits=True)
            return finetune_clip(data.train, config.align, out, log)
        parts = load_pretrained_parts(config.align)
        store = EmbeddingStore(store_dir)
        _check_store(store, config.encoder)
        data = read_training_data(sources, config, log, keep_selected_splits=True)
        evaluated = data.held_out if held_out else None
        return align(
            data.train, store, out, config.align, log, evaluated, config.encoder, features=features, parts=parts
        )


def run_distill(
    model: str,
    sources: Sequence[str],
    out: Path,
    student: str,
    config: DistillConfig,
    *,
    held_out: EvaluateConfig | None = None,
    columns: dict[str, str] | None = None,
    max_skipped: float = 0.05,
    texts: str | None = None,
    store: str | None = None,
) -> Path:
    """Teach a small text encoder to produce a model's text embeddings, and compare it with the model.

    Args:
        model: Folder or hub id of the teacher, an llm2clip model with a caption encoder.
        sources: Data sources. The training records' captions and phrases are the texts to learn from; images are needed
            only for the held-out records, on which both models are evaluated.
        out: Run directory. The result is `out/model`, and the comparison is `out/report.html`.
        student: See `open_student`.
        held_out: Settings that determine the held-out records. Default: as in `fit`.
        columns: Source column for each field.
        texts: File with additional texts to learn from, one per line.
        store: Store of the teacher's caption embeddings. Texts that are not in it are encoded into `out/store`.

    Returns:
        The model folder, which contains the teacher's image encoder and the student.

    Raises:
        ValueError: The teacher has no caption encoder, or the student's tokenizer cannot encode the texts.
        StoreError: The store was made by a different encoder.
        ConfigChangedError: The run directory was created with different settings.
    """
    start = time.monotonic()
    held_out = held_out or EvaluateConfig()
    settings: dict[str, Any] = {"model": model, "data": list(sources), "columns": columns or {}, "student": student}
    settings |= {"texts": texts, "store": store, "evaluate": held_out, "distill": config}
    model_dir = out / "model"
    is_trained, is_reported = model_dir.exists(), (out / "report.html").exists()
    wait_for_everyone()  # every rank must check which files exist before any rank creates them
    teacher: Teacher | None = None
    encoder: CaptionEncoder | None = None
    if not is_reported:  # check the arguments before the run directory is created
        folder = find_model_folder(model)
        teacher = Teacher(LLM2CLIP.from_pretrained(folder, process_state().device), folder, store)
        if not is_trained:
            encoder = open_student(student, folder, teacher.model.config.embed_dim, config)
    other_texts = Path(texts) if texts else None
    if other_texts is not None:
        for _ in iterate_lines(other_texts):  # raises an error if the file cannot be read
            pass
    with run_lock(out):
        log = start_run(out, settings, max_skipped)
        if teacher is None:
            return model_dir
        data = read_splits(sources, held_out, columns or {}, log, "header", True, out / "data")
        print_once(data.summary, log.summary())
        if encoder is None:
            teacher.open_store(out / "store")
        else:
            texts_to_learn = _embed_distill_texts(data, other_texts, encoder, teacher, out, max_skipped)
            encoder = distill(encoder, teacher, texts_to_learn, config, out)
            if process_state().is_main_process:
                build_student_model(teacher.model, encoder).save_pretrained(model_dir)
        wait_for_everyone()
        if process_state().is_main_process:
            evaluated = {name: table for name, table in data.held_out.items() if len(table)}
            seconds = time.monotonic() - start
            write_distill_report(out, teacher.model, teacher.encode, teacher.folder, evaluated, log, seconds)
            write_model_card(model_dir, out.resolve().name)
        wait_for_everyone()
        return model_dir


def _embed_distill_texts(
    data: DataSplits,
    other_texts: Path | None,
    student: CaptionEncoder,
    teacher: Teacher,
    out: Path,
    max_skipped: float,
) -> DistillTexts:
    """Encode the training texts and the texts to evaluate on with the teacher. Return the training texts."""
    train = add_phrases(data.train)
    held_out_texts = [table.iterate_texts(CAPTION_FIELDS) for table in data.held_out.values()]
    token_texts = filter(None, list_token_texts(student))
    training_texts = chain(iterate_captions(train, other_texts), iterate_phrases(train))
    teacher.embed(chain(training_texts, token_texts, *held_out_texts), out / "store")
    return prepare_texts(train, other_texts, student, teacher, out, max_skipped)


# ---- reading data ----------------------------------------------------------------------------------------------------


def read_training_data(
    sources: Sequence[str],
    config: FitConfig,
    log: SkipLog,
    keep_selected_splits: bool = False,
    folder: Path | None = None,
) -> DataSplits:
    """Read the records for `align`, including phrases if they are used, and print a summary.

    Args:
        log: Log of skipped rows.
        keep_selected_splits, folder: See `read_splits`.
    """
    data = read_splits(sources, config.evaluate, config.columns, log, "header", keep_selected_splits, folder)
    print_once(data.summary, log.summary())
    if config.align.uses_phrases:
        data.train = add_phrases(data.train)
    return data


def _read_fit_tuning_pairs(
    train: RecordTable, held_out: dict[str, RecordTable], config: FitConfig, run_dir: Path
) -> list[Sequence[TuningItem]]:
    """Return the tuning data for `fit`, or an empty list if tuning is disabled or already complete.

    Rows skipped in additional tuning sources go into a separate log, because the run's log covers only its image data.
    """
    if config.tune.steps == 0 or (run_dir / "tune" / "encoder").exists():
        return []
    own_captions = None if config.tune.data or config.tune.text_pairs else train
    has_other_sources = bool(config.tune.data or config.tune.text_pairs or config.tune.exclude)
    log = _open_skip_log(run_dir / "skipped_tune.jsonl" if has_other_sources else None, config.max_skipped)
    tables = list(held_out.values())
    pairs = read_tuning_sources(own_captions, tables, config.tune, config.columns, log, folder=run_dir / "data")
    if has_other_sources:
        print_once(f"tuning data: {log.summary()}")
    return pairs


def _read_tuning_pairs(sources: Sequence[str], config: FitConfig, log: SkipLog) -> list[Sequence[TuningItem]]:
    """Read the tuning data of the `tune` command."""
    if not (sources or config.tune.data or config.tune.text_pairs):
        raise ValueError("Nothing to tune on: pass caption sources, or text pairs with --tune.text_pairs")
    held_out: list[RecordTable] = []
    if any(not Source.parse(source).splits for source in sources):
        data = read_splits(sources, EvaluateConfig(), config.columns, log, "unchecked")
        held_out = list(data.held_out.values())
        if any(map(len, held_out)):
            print_once(data.summary)
    pairs = read_tuning_sources(None, held_out, config.tune, config.columns, log, training_sources=sources)
    print_once(log.summary())
    return pairs


def _open_skip_log(file: Path | None, max_skipped: float) -> SkipLog:
    """Return a skip log. Only the main process writes it to `file`."""
    return SkipLog(file if process_state().is_main_process else None, max_skipped)


# ---- checks before training ------------------------------------------------------------------------------------------


def start_run(run_dir: Path, config: dict[str, Any], max_skipped: float) -> SkipLog:
    """Save or check the config of a run (see `save_or_check_config`), and return the run's skip log."""
    state = process_state()
    if state.is_main_process:
        save_or_check_config(config, run_dir, state.num_processes)
    return _open_skip_log(run_dir / "skipped.jsonl", max_skipped)


def check_encoder(config: EncoderConfig) -> None:
    """Check that a caption encoder exists, without loading its weights.

    Raises:
        OSError: The encoder does not exist, or cannot be downloaded.
        ValueError: The folder does not contain a model.
    """
    path = resolve_pretrained(config.path)
    if path.endswith(".gguf"):
        resolve_gguf(path)
    elif not Path(path).is_dir():
        check_model_source(path)
        # Raises an error if the hub has no such model.
        cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    elif not any((Path(path) / name).is_file() for name in ENCODER_FILES):
        raise ValueError(
            f"--encoder.path {path} is not a caption encoder or LLM: it contains none of {', '.join(ENCODER_FILES)}"
        )


def _check_loss_and_trackers(config: AlignConfig) -> None:
    """Check that the loss exists and the experiment trackers are installed."""
    get_loss(config.loss)
    make_tracker_options(config.report_to, Path())


def _check_store(store: EmbeddingStore, encoder: EncoderConfig) -> None:
    """On the main process, check that a store is intact and was created with the given encoder."""
    if process_state().is_main_process:
        store.verify(progress=True)
        identity = store.manifest["identity"]
        check_identity(identity, open_encoder(encoder, "cpu").identity(identity["precision"]), store.folder)
    wait_for_everyone()
