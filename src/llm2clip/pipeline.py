"""Training runs: `fit`, its stages `tune`, `embed`, `align` and `evaluate`, and `distill`.

`open_run` locks a run directory and saves the settings of the run. Each stage writes its result atomically and skips
completed work, so running the same command again resumes an interrupted run. The commands `tune`, `embed` and `align`
each run one stage in a separate directory. `fit` runs all stages in one run directory with the following layout:

    RUN/
      config.yaml            all settings (when a run is resumed, settings that affect the result must not change)
      data/                  record tables: captions, references to the images, phrases (see data/build_table.py)
      skipped.jsonl          skipped rows and images, with their file and row number
      skipped_tune.jsonl     skipped rows of the sources in `tune.data` and `tune.text_pairs`
      encoder_choice.json    scores of the encoders compared by `--encoder.path auto`
      tune/                  encoder/ (the tuned caption encoder), metrics.jsonl, cra_*.json, checkpoints/
      store/                 embeddings of all captions
      align/                 metrics.jsonl, evaluations.jsonl, checkpoints/, features-*/ (if the tower is frozen)
      evaluate/              untrained.json and trained.json: retrieval metrics before and after `align`;
                             query_templates.json: templates for short queries, with retrieval metrics;
                             examples.json: held-out captions with the images that they retrieve
      durations.json         seconds spent in each stage, excluding interrupted attempts
      model/                 the trained model
      report.md, report.html
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils import cached_file

from llm2clip.config import AUTO, AlignConfig, DistillConfig, EncoderConfig, EvaluateConfig, FitConfig
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.build_table import DataSplits, build_record_table, read_data_splits
from llm2clip.data.noun_phrases import add_noun_phrases
from llm2clip.data.pairs import CaptionItems, TuningItems, read_tuning_sources, require_caption_pairs
from llm2clip.data.records import CAPTION_FIELDS, TEXT_FIELDS, Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.encoder_choice import (
    choose_caption_encoder,
    describe_encoder_choice,
    download_candidate_encoders,
    resolve_auto_encoder,
)
from llm2clip.evaluate.retrieval import (
    RetrievalRanks,
    build_dual_encoder_from_store,
    collect_example_searches,
    compute_field_metrics,
    compute_field_ranks,
    create_validation_function,
    evaluate_caption_fields,
)
from llm2clip.evaluate.short_queries import ShortQueryResult, choose_query_templates
from llm2clip.evaluate.training_report import write_distill_report, write_fit_report
from llm2clip.io_utils import iterate_lines, read_json
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.export.model_card import write_model_card
from llm2clip.models.llm2clip import LLM2CLIP, rotate_to_principal_components
from llm2clip.models.loading import check_model_source
from llm2clip.models.model_folder import find_model_folder, save_query_templates
from llm2clip.models.pretrained import resolve_gguf_folder, resolve_pretrained_name
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.models.text.caption_encoder import CaptionEncoder, load_encoder_for_evaluation
from llm2clip.runs.output_folder import ENCODER_CHOICE_FILE, find_latest_checkpoint, hold_run_lock, save_or_check_config
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state, wait_for_everyone
from llm2clip.runs.run_description import StageTimer
from llm2clip.store.encode import embed as embed_locally
from llm2clip.store.encode import embed_with_ray
from llm2clip.store.layout import check_identity, make_caption_keys
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align as train_align
from llm2clip.train.distill import (
    DistillationTexts,
    Teacher,
    build_student_model,
    decode_vocabulary,
    iterate_texts,
    load_student,
    prepare_training_texts,
)
from llm2clip.train.distill import distill as train_student
from llm2clip.train.initial_model import PretrainedParts, create_initial_model, load_pretrained_parts
from llm2clip.train.loop import make_tracker_options
from llm2clip.train.losses import get_loss
from llm2clip.train.sampling import resolve_images_per_step
from llm2clip.train.tune import tune as train_encoder

# The folder of a caption encoder or LLM contains at least one of these files.
ENCODER_FILES = ("config.json", "modules.json", "adapter_config.json", "text/modules.json")
ROTATION_CAPTIONS = 4096  # number of captions used to compute the rotation of the embedding space
# Settings used by each command that runs a single stage. `fit` uses all settings.
STAGE_SETTINGS = {"tune": ("columns", "encoder", "tune"), "embed": (), "align": ("columns", "encoder", "align")}

HeldOut = Mapping[str, Sequence[Record]]  # held-out records, keyed by caption column
Command = Literal["fit", "tune", "embed", "align"]


class Run:
    """Run directory that is locked by this process. The training data is read on first use."""

    def __init__(self, command: Command, sources: Sequence[str], out: Path, config: FitConfig) -> None:
        """
        Args:
            command: "fit", or a command that runs a single stage and ignores the other stages' settings.
            sources: Data sources, each in the form PATH or PATH@split+split (see `llm2clip.data.records.Source`).
            out: Run directory or, for the command "embed", the store folder.
        """
        self.command, self.sources, self.out, self.config = command, list(sources), out, config
        self.model_dir = out / "model"
        self.parts: PretrainedParts | None = None
        self.encoders: list[EncoderConfig] | None = None  # candidates of `choose_encoder`
        self.log = SkipLog()

    def get_stage_folder(self, stage: str) -> Path:
        return self.out / stage if self.command == "fit" else self.out

    def check_models_and_trackers(self) -> None:
        """Check that the models, the loss and the trackers named in the settings exist.

        For `fit`, also load the pretrained parts for `align`, so that loading errors occur before `tune`.
        """
        if self.model_dir.exists():
            return
        if self.command in ("fit", "align"):
            get_loss(self.config.align.loss)
            make_tracker_options(self.config.align.report_to, Path())
        if self.command == "fit":
            self.parts = load_pretrained_parts(self.config.align)
        if self.command in ("fit", "tune") and not (self.get_stage_folder("tune") / "encoder").exists():
            if self.config.encoder.path == AUTO:
                self.encoders = download_candidate_encoders()
            else:
                check_encoder_exists(self.config.encoder)

    @cached_property
    def data(self) -> DataSplits:
        """Training records, with phrases if `align` uses them, and held-out records."""
        is_fit, config = self.command == "fit", self.config
        folder = self.out / "data" if is_fit else None
        data = read_data_splits(self.sources, config.evaluate, config.columns, self.log, "header", not is_fit, folder)
        print_once(data.summary, self.log.summary())
        if config.align.uses_phrases:
            data.train = add_noun_phrases(data.train)
        # Raises an error if there are too few images. A resumed run keeps the number of images per step.
        if find_latest_checkpoint(self.get_stage_folder("align") / "checkpoints") is None:
            num_images = int(data.train.has_image.sum())
            resolve_images_per_step(num_images, config.align, process_state().num_processes)
        tune, is_tuned = config.tune, (self.get_stage_folder("tune") / "encoder").exists()
        if is_fit and tune.steps and not (tune.data or tune.text_pairs or is_tuned):
            require_caption_pairs(CaptionItems(data.train))  # fails before the LLM is loaded
        return data

    def iterate_texts(self, phrases: bool) -> Iterator[str]:
        """Yield all texts to embed, possibly with duplicates. `phrases` is ignored unless the command is `embed`."""
        if self.command == "fit":
            fields = TEXT_FIELDS if self.config.align.uses_phrases else CAPTION_FIELDS
            held_out = (table.iterate_texts(CAPTION_FIELDS) for table in self.data.held_out.values())
            return chain(self.data.train.iterate_texts(fields), *held_out)
        records = build_record_table(self.sources, self.config.columns, self.log, "ignore")
        return (
            add_noun_phrases(records).iterate_texts(TEXT_FIELDS) if phrases else records.iterate_texts(CAPTION_FIELDS)
        )

    def read_tuning_pairs(self) -> list[TuningItems]:
        """Read the training data for `tune`: one list of image captions or text pairs per source."""
        if self.command != "fit":
            return self._read_pairs_for_tune_command()
        config, data = self.config.tune, self.data
        own_captions = None if config.data or config.text_pairs else data.train
        # `self.log` covers only the image data, so skipped rows of other sources are logged in a separate file.
        has_other_sources = bool(config.data or config.text_pairs or config.exclude)
        log = _open_skip_log(self.out / "skipped_tune.jsonl" if has_other_sources else None, self.config.max_skipped)
        held_out, folder = list(data.held_out.values()), self.out / "data"
        pairs = read_tuning_sources(own_captions, held_out, config, self.config.columns, log, folder=folder)
        if has_other_sources:
            print_once(f"tuning data: {log.summary()}")
        return pairs

    def _read_pairs_for_tune_command(self) -> list[TuningItems]:
        config, columns = self.config.tune, self.config.columns
        if not (self.sources or config.data or config.text_pairs):
            raise ValueError("Nothing to tune on: pass caption sources, or text pairs with --tune.text_pairs")
        held_out: list[RecordTable] = []
        if self.sources:
            data = read_data_splits(
                self.sources, EvaluateConfig(), columns, self.log, "unchecked", keep_selected_splits=True
            )
            held_out = list(data.held_out.values())
            if any(map(len, held_out)):
                print_once(data.summary)
        pairs = read_tuning_sources(None, held_out, config, columns, self.log, training_sources=self.sources)
        print_once(self.log.summary())
        return pairs


@contextmanager
def open_run(
    command: Command, sources: Sequence[str], out: Path, config: FitConfig, **other_settings: Any
) -> Iterator[Run]:
    """Create or reopen a run directory, and lock it until the end of the `with` block.

    The settings are saved in the directory. If it contains an interrupted run, that run is resumed.

    Raises:
        ConfigChangedError: The run directory was created with different settings.
        FolderInUseError: Another run is writing to the run directory. The directory is left unchanged.
        ValueError: A setting names a model, a loss or a tracker that does not exist.
    """
    run = Run(command, sources, out, config)
    run.check_models_and_trackers()
    settings = dataclasses.asdict(config)
    if command != "fit":
        settings = {name: settings[name] for name in STAGE_SETTINGS[command]}
    with hold_run_lock(out):
        if settings and process_state().is_main_process:
            save_or_check_config({"data": run.sources, **other_settings, **settings}, out)
        run.log = _open_skip_log(out / "skipped.jsonl", config.max_skipped)
        yield run


def fit(run: Run) -> Path:
    """Run all stages on captioned images, and write a report. Return the model folder.

    Raises:
        TooManySkippedError: The fraction of skipped rows exceeds `config.max_skipped`.
        ValueError: The dataset is too small for the settings, or contains no captions to train on.
    """
    data, timer = run.data, StageTimer(run.out)
    if run.config.encoder.path == AUTO:
        timer.start("1/4 tune: skipped; choosing a caption encoder")
        choose_encoder(run)
    else:
        timer.start("1/4 tune: contrastive training of the language model on captions")
    encoder = EncoderConfig(path=str(tune(run)))
    timer.start("2/4 embed: encoding every caption into the store")
    store = embed(run, encoder)
    timer.start("3/4 align: training the vision tower against the store")
    model_dir = align(run, store, encoder)
    timer.start("4/4 evaluate: retrieval on held-out images")
    trained = evaluate(run, store)
    timer.stop()
    if process_state().is_main_process:
        write_fit_report(run.out, trained, f"{data.summary}. {run.log.summary()}.", run.config.encoder)
        write_model_card(model_dir, run.out.resolve().name)
    return model_dir


# ---- stages ----------------------------------------------------------------------------------------------------------


def choose_encoder(run: Run) -> None:
    """Set `run.config.encoder` to the best of a few candidates (see `llm2clip.evaluate.encoder_choice`)."""
    file, config = run.out / ENCODER_CHOICE_FILE, run.config.align
    tower = {"tower": config.tower, "image_size": config.image_size}
    is_used = (run.out / "tune/encoder").exists()
    if process_state().is_main_process and file.exists() and not (is_used or read_json(file).items() >= tower.items()):
        file.unlink()  # written by an interrupted run with another vision tower
        (run.out / "tune/cra_raw.json").unlink(missing_ok=True)

    def compute_choice() -> dict[str, Any]:
        parts = run.parts or load_pretrained_parts(config)
        return {
            **tower,
            **choose_caption_encoder(run.data.train, parts.tower, run.encoders or download_candidate_encoders()),
        }

    choice = load_or_compute_json(file, compute_choice)
    run.config = resolve_auto_encoder(run.config, EncoderConfig(**choice["encoder"]))
    print_once(describe_encoder_choice(choice))


def tune(run: Run) -> Path:
    """Tune the caption encoder on text pairs. Return the folder of the tuned caption encoder.

    A `fit` run without QLoRA also measures caption retrieval accuracy before and after tuning, if at least two held-out
    images have two or more distinct captions.

    Raises:
        ValueError: There are no captions or text pairs to tune on.
    """
    out, encoder, config = run.get_stage_folder("tune"), run.config.encoder, run.config.tune
    encoder_dir = out / "encoder"
    is_done = encoder_dir.exists()
    wait_for_everyone()  # every rank must check whether the folder exists before any rank creates it
    is_skipped = is_done or (run.command == "fit" and config.steps == 0)
    pairs = [] if is_skipped else run.read_tuning_pairs()
    # Caption retrieval is evaluated only by `fit`.
    captions = run.data.held_out["captions"].column("captions").to_pylist() if run.command == "fit" else []
    # QLoRA is for LLMs that do not fit on the device without quantisation, so the untuned LLM is not evaluated.
    measure = sum(len(set(each)) > 1 for each in captions) > 1 and not config.qlora
    # On a CPU, the same encoder is evaluated and then tuned. On a GPU, a second copy in bf16 is evaluated.
    raw = open_encoder(encoder, "cpu") if process_state().device.type == "cpu" and not is_done else None
    if measure:
        load_or_compute_json(out / "cra_raw.json", lambda: _measure_caption_retrieval(captions, encoder, raw))
    if not is_done:
        # Load the encoder on the CPU, so that a GPU holds only the weights in the training precision.
        train_encoder(pairs, raw or open_encoder(encoder, "cpu"), config, out)
        del raw
        free_memory()  # the LLM is no longer needed
    if measure and config.steps > 0:
        load_or_compute_json(
            out / "cra_tuned.json", lambda: _measure_caption_retrieval(captions, EncoderConfig(str(encoder_dir)))
        )
    return encoder_dir


def embed(
    run: Run,
    encoder: EncoderConfig,
    *,
    phrases: bool = True,
    engine: Literal["local", "ray"] = "local",
    ray_workers: int = 0,
) -> EmbeddingStore:
    """Encode all captions into an embedding store. Captions that are already in the store are skipped.

    Args:
        phrases: Also encode short phrases from the captions. `fit` encodes phrases only if `align` uses them.
        engine: "local" encodes on the ranks started by the launcher. "ray" encodes on a Ray cluster.
        ray_workers: Number of Ray workers. Default (0): one per GPU or, without GPUs, one per two CPU cores.
    """
    texts, out = run.iterate_texts(phrases), run.get_stage_folder("store")
    options = dataclasses.asdict(run.config.embed)
    if engine == "ray":
        store = embed_with_ray(texts, partial(open_encoder, encoder), out, workers=ray_workers, **options)
    else:
        # Load the encoder on the CPU, so that the GPU holds only the weights required for encoding.
        store = embed_locally(texts, open_encoder(encoder, "cpu"), out, device=process_state().device, **options)
    if run.command == "embed":
        print_once(run.log.summary())
    return store


def align(run: Run, store: EmbeddingStore, encoder: EncoderConfig, features: Path | None = None) -> Path:
    """Train the vision tower, its projection and the adapter on cached caption embeddings. Return the model folder.

    The model is evaluated on the held-out images before and during training. The command `align` evaluates the model
    only if `config.evaluate.data` lists held-out sources.

    Args:
        store: Cached embeddings of the training captions. Phrases without an embedding, and captions that the tokenizer
            could not encode, are not used. If another caption is missing, `align` raises StoreError.
        encoder: Caption encoder that was used to create the store. It is saved with the model.
        features: Folder for the cached features of a frozen tower, which several runs can share. Default: in `run.out`.
    """
    model_dir, out, config = run.model_dir, run.get_stage_folder("align"), run.config.align
    if model_dir.exists():
        return model_dir
    parts = run.parts or load_pretrained_parts(config)
    if run.command == "align":
        _check_store_encoder(store, encoder)
    train = run.data.train
    held_out: HeldOut = run.data.held_out if run.command == "fit" or run.config.evaluate.data else {}
    free_memory()  # the LLM is no longer needed
    model = create_initial_model(config, store, train, out, parts)
    validate = None
    if held_out:
        held_out = _drop_unencodable_captions(held_out, store)
        evaluations = run.out / "evaluate"
        if process_state().is_main_process:
            for name in ("trained.json", "query_templates.json", "examples.json"):  # metrics of an earlier model
                (evaluations / name).unlink(missing_ok=True)
            if not (out / "checkpoints").exists():
                (evaluations / "untrained.json").unlink(missing_ok=True)  # written by a run with other `align` settings
        untrained = ModelEmbeddings(build_dual_encoder_from_store(model, store), run.log)
        load_or_compute_json(evaluations / "untrained.json", lambda: evaluate_caption_fields(untrained, held_out))
        validate = create_validation_function(held_out, run.log, store)
    model = train_align(train, store, model, config, out, run.log, validate, features)
    if process_state().is_main_process:
        rotate_embedding_space(model, train, store, config)
        _save_model(model, model_dir, encoder)
    wait_for_everyone()
    return model_dir


def evaluate(run: Run, store: EmbeddingStore) -> list[dict[str, Any]]:
    """Evaluate the trained model's image-text retrieval on held-out images, with text embeddings from the store.

    If the model has a caption encoder, also choose prompt templates for short queries (see `choose_query_templates`),
    and save them in the model's config. Return one row of metrics per caption column (see `evaluate_caption_fields`).
    """
    out = run.get_stage_folder("evaluate")
    held_out = _drop_unencodable_captions(run.data.held_out, store)
    model = LLM2CLIP.from_pretrained(run.model_dir)
    embeddings = ModelEmbeddings(build_dual_encoder_from_store(model, store), run.log)
    ranked = cache(lambda: compute_field_ranks(embeddings, held_out))
    rows: list[dict[str, Any]] = load_or_compute_json(
        out / "trained.json", lambda: compute_field_metrics(embeddings, ranked())
    )
    if model.has_encoder:
        choice = load_or_compute_json(
            out / "query_templates.json", lambda: _choose_query_templates(model, ranked(), run.log)
        )
        if process_state().is_main_process:
            save_query_templates(run.model_dir, QueryTemplates.from_dict(choice))
    load_or_compute_json(out / "examples.json", lambda: collect_example_searches(next(iter(ranked().values()))))
    return rows


# ---- distill ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DistillOptions:
    """Options of `distill`. The training texts are the captions and phrases of the training records."""

    model: str  # folder or hub id of the teacher, an llm2clip model with a caption encoder
    data: Sequence[str]  # data sources; images are needed only for the held-out records
    student: str  # see `load_student`
    distill: DistillConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    columns: dict[str, str] = field(default_factory=dict)
    max_skipped: float = 0.05
    texts: str | None = None  # file with additional training texts, one per line
    store: str | None = None  # store with embeddings from the teacher; other texts are encoded into `out/store`


def distill(options: DistillOptions, out: Path) -> Path:
    """Train a small text encoder (the student) to reproduce the text embeddings of a model (the teacher).

    Write a model with the teacher's image encoder and the student to `out/model`, and a comparison of the student with
    the teacher to `out/report.html`.

    Raises:
        ValueError: The teacher has no caption encoder, or the student's tokenizer cannot encode the texts.
        StoreError: The store was created with a different encoder.
        ConfigChangedError: The run directory was created with different settings.
    """
    start = time.monotonic()
    model_dir = out / "model"
    is_trained, is_complete = model_dir.exists(), (out / "report.html").exists()
    wait_for_everyone()  # every rank must check which files exist before any rank creates them
    teacher = student = None
    if not is_complete:  # check the arguments before the run directory is created
        folder = find_model_folder(options.model)
        teacher = Teacher(LLM2CLIP.from_pretrained(folder, process_state().device), folder, options.store)
        if not is_trained:
            student = load_student(options.student, folder, teacher.model.config.embed_dim, options.distill)
    if options.texts is not None:
        for _ in iterate_lines(Path(options.texts)):  # raises an error if the file is unreadable
            pass
    with hold_run_lock(out):
        if process_state().is_main_process:
            settings = vars(options).items()
            save_or_check_config({name: value for name, value in settings if name != "max_skipped"}, out)
        log = _open_skip_log(out / "skipped.jsonl", options.max_skipped)
        if teacher is None:
            return model_dir
        data = read_data_splits(options.data, options.evaluate, options.columns, log, "header", True, out / "data")
        print_once(data.summary, log.summary())
        if student is None:
            teacher.open_store(out / "store")
        else:
            texts = _prepare_distill_texts(data, options, student, teacher, out)
            student = train_student(student, teacher, texts, options.distill, out)
            if process_state().is_main_process:
                build_student_model(teacher.model, student).save_pretrained(model_dir)
        wait_for_everyone()
        if process_state().is_main_process:
            evaluated = {name: table for name, table in data.held_out.items() if len(table)}
            seconds = time.monotonic() - start
            write_distill_report(out, teacher.model, teacher.encode, teacher.folder, evaluated, log, seconds)
            write_model_card(model_dir, out.resolve().name)
        wait_for_everyone()
        return model_dir


def _prepare_distill_texts(
    data: DataSplits, options: DistillOptions, student: CaptionEncoder, teacher: Teacher, out: Path
) -> DistillationTexts:
    train = add_noun_phrases(data.train)
    other_texts = Path(options.texts) if options.texts else None
    held_out_texts = [table.iterate_texts(CAPTION_FIELDS) for table in data.held_out.values()]
    token_texts = list(filter(None, decode_vocabulary(student)))
    if token_texts:
        print_once(f"Teacher inputs: the captions and the student's vocabulary ({len(token_texts):,} tokens)")
    teacher.embed_missing_texts(chain(*iterate_texts(train, other_texts), token_texts, *held_out_texts), out / "store")
    return prepare_training_texts(train, other_texts, student, teacher, out, options.max_skipped)


# ---- helpers ---------------------------------------------------------------------------------------------------------


def open_encoder(config: EncoderConfig, device: str | None = None) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(config), device=device)


def _open_skip_log(file: Path | None, max_skipped: float) -> SkipLog:
    return SkipLog(file if process_state().is_main_process else None, max_skipped)


def check_encoder_exists(config: EncoderConfig) -> None:
    """Raise OSError or ValueError if a caption encoder does not exist. The weights are not loaded."""
    path = resolve_pretrained_name(config.path)
    if path.endswith(".gguf"):
        resolve_gguf_folder(path)
    elif not Path(path).is_dir():
        check_model_source(path)
        # Raises an error if the hub has no such model.
        cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
    elif not any((Path(path) / name).is_file() for name in ENCODER_FILES):
        raise ValueError(
            f"--encoder.path {path} is not a caption encoder or LLM: it contains none of {', '.join(ENCODER_FILES)}"
        )


def _check_store_encoder(store: EmbeddingStore, encoder: EncoderConfig) -> None:
    if process_state().is_main_process:
        store.verify()
        identity = store.manifest["identity"]
        check_identity(identity, open_encoder(encoder, "cpu").identity(identity["precision"]), store.folder)
    wait_for_everyone()


def _drop_unencodable_captions(held_out: HeldOut, store: EmbeddingStore) -> HeldOut:
    return {column: drop_refused_captions(records, store) for column, records in held_out.items()}


def _measure_caption_retrieval(
    captions: Sequence[Sequence[str]], encoder: EncoderConfig, loaded: CaptionEncoder | None = None
) -> dict[str, Any]:
    model = loaded or load_encoder_for_evaluation(device=process_state().device, **dataclasses.asdict(encoder))
    metrics = caption_retrieval_accuracy(captions, model)
    del model
    free_memory()
    return metrics


def _choose_query_templates(model: LLM2CLIP, ranked: Mapping[str, RetrievalRanks], log: SkipLog) -> dict[str, Any]:
    embeddings = ModelEmbeddings(wrap_llm2clip(model, "llm2clip"), log)
    try:
        choice = choose_query_templates(embeddings, next(iter(ranked.values())))
    except ValueError as error:
        print_once(f"Short queries are encoded without prompt templates: {error}")
        return ShortQueryResult(NO_TEMPLATES, []).to_dict()
    print_once(choice.describe_templates())
    return choice.to_dict()


def rotate_embedding_space(model: LLM2CLIP, train: RecordTable, store: EmbeddingStore, config: AlignConfig) -> None:
    """Rotate a model's embedding space to its principal components, so that embeddings can be truncated.

    Spaces that were not created by `align`, or were trained with Matryoshka dimensions, are not rotated. The principal
    components are computed from a random sample of captions, at most one per training record.
    """
    is_trained_space = model.config.projection and model.config.adapter.depth > 0 and not config.inherit
    if not is_trained_space or config.matryoshka_dims:
        return
    indices = np.random.default_rng(0).permutation(len(train))[:ROTATION_CAPTIONS]
    texts = [record.texts[0] for record in (train[int(index)] for index in np.sort(indices)) if record.texts]
    rows = store.find_keys(make_caption_keys(texts))
    captions = torch.from_numpy(store.take(rows[rows >= 0]))  # captions that the tokenizer could not encode have no row
    if len(captions):
        rotate_to_principal_components(model, captions)


def _save_model(model: LLM2CLIP, folder: Path, encoder: EncoderConfig) -> None:
    # A local folder is copied if `encoder` does not override its saved settings.
    if encoder == EncoderConfig(path=encoder.path) and (Path(encoder.path) / "modules.json").is_file():
        model.save_pretrained(folder, encoder=encoder.path)
    else:
        free_memory()  # the optimizer is no longer needed
        model.save_pretrained(folder, encoder=open_encoder(encoder, "cpu"))
    write_model_card(folder, folder.name)
