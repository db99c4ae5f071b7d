"""The four stages `tune`, `embed`, `align` and `evaluate`, and `fit`, which runs them in this order.

The command line and `reproduce` both call these functions. Each stage writes its result atomically and skips completed
work, so an interrupted run can be resumed by running the same command again. A run directory has this layout:

    RUN/
      config.yaml            all settings; a resumed run must not change settings that affect the result
      skipped.jsonl          rows and images that could not be used, with their file and row number
      skipped_tune.jsonl     the same for the sources in `tune.data` and `tune.text_pairs`
      tune/                  encoder/ (the tuned caption encoder), metrics.jsonl, cra_*.json, checkpoints/
      store/                 the embedding of every caption
      align/                 metrics.jsonl, evaluations.jsonl, checkpoints/, best/, features-*/ (if the tower is frozen)
      evaluate/              untrained.json and trained.json: retrieval metrics before and after `align`;
                             query_templates.json: templates for short queries, with retrieval metrics;
                             examples.json: held-out captions with the images that they retrieve
      durations.json         seconds that each stage has taken, without interrupted attempts
      model/                 the trained model
      report.md, report.html
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import cached_file

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.noun_phrases import add_phrases
from llm2clip.data.pairs import TuningItem
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits
from llm2clip.data.tuning_sources import read_tuning_sources
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.query_templates import TemplateChoice, choose_query_templates
from llm2clip.evaluate.reporting.error_analysis import example_searches
from llm2clip.evaluate.reporting.fit_report import summary_table, write_fit_report
from llm2clip.evaluate.retrieval_eval import (
    RetrievalRanks,
    caption_field_metrics,
    dual_encoder_from_store,
    evaluate_caption_fields,
    make_validator,
    rank_caption_fields,
)
from llm2clip.html_report import to_markdown
from llm2clip.models.dual_encoder import from_llm2clip
from llm2clip.models.export.model_card import write_model_card
from llm2clip.models.hub.model_names import check_model_source
from llm2clip.models.hub.pretrained import resolve_gguf, resolve_pretrained
from llm2clip.models.inherited_clip import load_inherited_clip, model_in_clip_space
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import save_query_templates
from llm2clip.models.precision import load_for_evaluation, resolve_precision
from llm2clip.models.pretrained_logits import read_pretrained_logits
from llm2clip.models.prompts import LITERAL, QueryTemplates
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.checkpoint import latest_checkpoint, read_metrics
from llm2clip.runs.lock import run_lock
from llm2clip.runs.ranks import cached_json, print_once, process_state, wait_for_everyone
from llm2clip.runs.run_config import CONFIG_FILE, save_or_check_config
from llm2clip.runs.run_description import DURATIONS_FILE, StageClock
from llm2clip.store.encode import embed as embed_locally
from llm2clip.store.ray_engine import embed_with_ray
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align as train_align
from llm2clip.train.align import tracker_options
from llm2clip.train.inherit import inherit_text_space
from llm2clip.train.initial_model import new_model_config
from llm2clip.train.sampling import resolve_images_per_step, training_texts
from llm2clip.train.tune import tune as train_tune

# A folder of a caption encoder or LLM contains at least one of these files.
ENCODER_FILES = ("config.json", "modules.json", "adapter_config.json", "text/modules.json")

HeldOut = Mapping[str, Sequence[Record]]  # caption column -> records


def fit(
    sources: Sequence[str],
    run_dir: Path,
    config: FitConfig,
    check_resources: Callable[[FitConfig, Path, Sequence[Record]], list[str]] | None = None,
) -> Path:
    """Run all stages on captioned images.

    Args:
        sources: Data sources, each in the form PATH or PATH@split+split (see `llm2clip.data.records.Source`).
        run_dir: Run directory. An interrupted run in this directory is resumed.
        config: Settings for all stages.
        check_resources: Function that is called with the settings, the run directory and the training records before
            training starts, and returns warnings to print.

    Returns:
        The model folder.

    Raises:
        ConfigChangedError: The run directory was created with different settings.
        TooManySkipped: The fraction of rows that cannot be used exceeds `config.max_skipped`.
        ValueError: The data set is too small for the settings, or contains no captions to train on.
        FolderInUseError: Another run is writing to the run directory, which is left unchanged.
    """
    is_complete = (run_dir / "model").exists()
    if not is_complete:
        check_align_models(config.align)
        if not (run_dir / "tune/encoder").exists():
            check_encoder(config.encoder)
    with run_lock(run_dir):
        return _run_stages(sources, run_dir, config, None if is_complete else check_resources)


def _run_stages(
    sources: Sequence[str],
    run_dir: Path,
    config: FitConfig,
    check_resources: Callable[[FitConfig, Path, Sequence[Record]], list[str]] | None,
) -> Path:
    log = start_run(run_dir, {"data": list(sources), **dataclasses.asdict(config)}, config.max_skipped)
    data = read_splits(sources, config.evaluate, config.columns, log)
    print_once(data.summary, log.summary())
    if latest_checkpoint(run_dir / "align" / "checkpoints") is None:  # otherwise, images per step stay the same
        resolve_images_per_step(
            sum(r.image is not None for r in data.train), config.align, process_state().num_processes
        )
    if check_resources is not None and process_state().is_main_process:
        print_once(*check_resources(config, run_dir, data.train))

    clock = StageClock(run_dir)
    clock.start("1/4 tune: contrastive training of the language model on captions")
    pairs = _tuning_pairs(data.train, data.held_out, config, run_dir)
    held_out_captions = [record.captions for record in data.held_out["captions"]]
    encoder = EncoderConfig(path=str(tune(pairs, run_dir / "tune", config.encoder, config.tune, held_out_captions)))

    clock.start("2/4 embed: encoding every caption into the store")
    train = add_phrases(data.train) if config.align.uses_phrases else data.train
    train_texts = (text for record in train for text in training_texts(record, config.align))
    held_out_texts = (text for column in data.held_out.values() for record in column for text in record.texts)
    store = embed(chain(train_texts, held_out_texts), run_dir / "store", encoder, config.embed)

    clock.start("3/4 align: training the vision tower against the store")
    train = drop_refused_captions(train, store)
    held_out = {column: drop_refused_captions(records, store) for column, records in data.held_out.items()}
    model_dir = align(train, store, run_dir / "align", config.align, log, held_out, encoder, run_dir / "model")

    clock.start("4/4 evaluate: retrieval on held-out images")
    trained = evaluate(model_dir, held_out, run_dir / "evaluate", log, store)
    clock.stop()
    if process_state().is_main_process:
        _write_report(run_dir, model_dir, trained, f"{data.summary}. {log.summary()}.")
    return model_dir


def tune(
    pairs: Sequence[Sequence[TuningItem]],
    out: Path,
    encoder: EncoderConfig,
    config: TuneConfig,
    held_out_captions: Sequence[Sequence[str]] = (),
) -> Path:
    """Tune the caption encoder on pairs of texts.

    Args:
        pairs: One list of image captions or text pairs per source (see `read_tuning_sources`).
        out: Output folder of this stage.
        encoder: Initial caption encoder.
        config: Settings for this stage.
        held_out_captions: Captions of each held-out image. If at least two images have two or more distinct captions
            each, caption retrieval accuracy is measured before and after tuning, except with QLoRA. The results are
            saved in cra_raw.json and cra_tuned.json.

    Returns:
        The folder of the tuned caption encoder, `out/encoder`.
    """
    encoder_dir = out / "encoder"
    is_done = encoder_dir.exists()
    wait_for_everyone()  # every rank must check if the folder exists before it is created
    # QLoRA is for LLMs that do not fit on the device without quantisation, so the untuned LLM is not evaluated.
    measure = sum(len(set(captions)) > 1 for captions in held_out_captions) > 1 and not config.qlora
    # On a CPU, the encoder that is measured is also tuned. GPUs measure in bf16, which requires a separate encoder.
    raw = open_encoder(encoder, "cpu") if process_state().device.type == "cpu" and not is_done else None
    if measure:
        cached_json(out / "cra_raw.json", lambda: _measure_cra(held_out_captions, encoder, raw))
    if not is_done:
        # Load the encoder on the CPU, so that a GPU only has to hold the weights in the training precision.
        train_tune(pairs, raw or open_encoder(encoder, "cpu"), config, out)
        del raw
        free_memory()  # the LLM is no longer needed
    if measure:
        cached_json(out / "cra_tuned.json", lambda: _measure_cra(held_out_captions, EncoderConfig(str(encoder_dir))))
    return encoder_dir


def embed(
    captions: Iterable[str],
    out: Path,
    encoder: EncoderConfig,
    config: EmbedConfig,
    *,
    engine: Literal["local", "ray"] = "local",
    ray_workers: int = 0,
) -> EmbeddingStore:
    """Encode captions into an embedding store. Captions that are already in the store are skipped.

    Args:
        captions: Captions to encode. May contain duplicates.
        out: Folder of the embedding store.
        encoder: Frozen caption encoder.
        config: Settings for this stage.
        engine: "local" uses the ranks that the launcher started. "ray" uses a Ray cluster.
        ray_workers: Number of Ray workers. 0 means one worker per GPU or, if there are no GPUs, one per two CPU cores.
    """
    options = dataclasses.asdict(config)
    if engine == "ray":
        return embed_with_ray(captions, partial(open_encoder, encoder), out, workers=ray_workers, **options)
    # Load the encoder on the CPU, so that the GPU only has to hold the weights that are required for encoding.
    return embed_locally(captions, open_encoder(encoder, "cpu"), out, device=process_state().device, **options)


def align(
    train: Sequence[Record],
    store: EmbeddingStore,
    out: Path,
    config: AlignConfig,
    log: SkipLog,
    held_out: HeldOut | None = None,
    encoder: EncoderConfig | None = None,
    model_dir: Path | None = None,
    features: Path | None = None,
) -> Path:
    """Train the vision tower, its projection and the adapter against the cached caption embeddings.

    Args:
        train: Training records. All of their captions must be in the store.
        store: Cached caption embeddings.
        out: Output folder of this stage.
        config: Settings for this stage.
        log: Log of skipped rows and images, to which images that cannot be decoded are added.
        held_out: Records on which to evaluate the model before and during training, keyed by caption column.
        encoder: Caption encoder to save with the model. If None, the model is saved without a caption encoder.
        model_dir: Folder in which to save the model. Default: `out/model`.
        features: Folder of the feature store, which caches the frozen tower's features and can be shared by several
            runs. Default: a folder in `out`.

    Returns:
        The model folder.
    """
    state = process_state()
    model_dir = model_dir or out / "model"
    if model_dir.exists():
        return model_dir
    free_memory()  # the LLM is no longer needed
    model = new_model(config, store, train, out)
    validate = None
    if held_out:
        evaluations = out.parent / "evaluate"
        if state.is_main_process:
            for name in ("trained.json", "query_templates.json", "examples.json"):  # results of an earlier model
                (evaluations / name).unlink(missing_ok=True)
            if not (out / "checkpoints").exists():  # the `align` settings may have changed
                (evaluations / "untrained.json").unlink(missing_ok=True)
        cached_json(evaluations / "untrained.json", lambda: _evaluate_from_store(model, held_out, store, log))
        validate = make_validator(held_out, log, store)
    model = train_align(train, store, model, config, out, log, validate, features)
    if state.is_main_process:
        _save_model(model, model_dir, encoder)
    wait_for_everyone()
    return model_dir


def evaluate(
    model_dir: Path, held_out: HeldOut, out: Path, log: SkipLog, store: EmbeddingStore
) -> list[dict[str, Any]]:
    """Evaluate image-text retrieval with a trained model on held-out images, using text embeddings from the store.

    If the model has a caption encoder, also choose the prompt templates for short queries (see
    `choose_query_templates`), and save them in the model's config and, with their results, in `query_templates.json`.

    Args:
        model_dir: Model folder.
        held_out: Records on which to evaluate, keyed by caption column.
        out: Output folder of this stage, in which the metrics are saved as `trained.json`, and example searches as
            `examples.json`.
        log: Log of skipped rows and images, to which images that cannot be decoded are added.
        store: Store that contains the embeddings of the held-out captions.

    Returns:
        One row of metrics per caption column (see `evaluate_caption_fields`).
    """
    model = LLM2CLIP.from_pretrained(model_dir)
    embeddings = ModelEmbeddings(dual_encoder_from_store(model, store), log)
    ranked = cache(lambda: rank_caption_fields(embeddings, held_out))
    rows: list[dict[str, Any]] = cached_json(out / "trained.json", lambda: caption_field_metrics(embeddings, ranked()))
    if model.has_encoder:
        choice = cached_json(out / "query_templates.json", lambda: _choose_query_templates(model, ranked(), log))
        if process_state().is_main_process:
            save_query_templates(model_dir, QueryTemplates.from_dict(choice))
    cached_json(out / "examples.json", lambda: example_searches(next(iter(ranked().values()))))
    return rows


# ---- shared by the stages and the command line ---------------------------------------------------------------------


def start_run(run_dir: Path, config: dict[str, Any], max_skipped: float) -> SkipLog:
    """Save or check the config of a run (see `save_or_check_config`), and return the run's skip log."""
    state = process_state()
    if state.is_main_process:
        save_or_check_config(config, run_dir, state.num_processes)
    return SkipLog(run_dir / "skipped.jsonl" if state.is_main_process else None, max_skipped)


def check_encoder(config: EncoderConfig) -> None:
    """Check that a caption encoder exists, without loading its weights, before the data is read.

    Raises:
        OSError: The encoder does not exist, or cannot be downloaded.
        ValueError: The folder does not contain a model.
    """
    path = resolve_pretrained(config.path)
    if path.endswith(".gguf"):
        resolve_gguf(path)
    elif not Path(path).is_dir():
        check_model_source(path)
        cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)  # raises an error for other ids
    elif not any((Path(path) / name).is_file() for name in ENCODER_FILES):
        raise ValueError(
            f"--encoder.path {path} is not a caption encoder or LLM: it has no {' or '.join(ENCODER_FILES)}"
        )


@torch.random.fork_rng(devices=[])
def check_align_models(config: AlignConfig) -> None:
    """Load all models that `align` needs, so that errors occur before hours of reading data, tuning and encoding.

    Raises:
        OSError: A model does not exist, or cannot be downloaded.
        ValueError: A model does not support the settings.
        ImportError: A required package is not installed.
    """
    tracker_options(config.report_to, Path())
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    if config.image_size is not None:
        try:
            tower(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--align.image_size: {config.tower} cannot encode images of {config.image_size} pixels ({error})"
            ) from error
    if config.gradient_checkpointing:
        tower.set_grad_checkpointing()
    if config.inherit:
        load_inherited_clip(config.tower, config.inherit, torch.device("cpu"))
    if config.logit_scale == "inherit":
        read_pretrained_logits(config.tower)


def open_encoder(config: EncoderConfig, device: str | None = None) -> CaptionEncoder:
    """Load the caption encoder described by `config`. If `device` is None, load it on this rank's device."""
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(config), device=device)


def new_model(
    config: AlignConfig, store: EmbeddingStore, train: Sequence[Record] = (), out: Path | None = None
) -> LLM2CLIP:
    """Create a model from a pretrained tower and heads that are randomly initialised with the config's seed.

    With `config.inherit`, the heads come from a CLIP model instead (see `train/inherit.py`).

    Args:
        config: Settings of the `align` stage.
        store: Cached caption embeddings.
        train: Training records with the texts from which the adapter learns. Used only with `config.inherit`.
        out: Folder for the adapter and its cache. Required with `config.inherit`.
    """
    device = process_state().device
    torch.manual_seed(config.seed)
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    tower.freeze_norm = True  # keep the pretrained batch-norm statistics
    model_config = new_model_config(config, tower, store.embed_dim, store.manifest["identity"])
    if config.inherit:
        assert out is not None
        clip = load_inherited_clip(config.tower, config.inherit, device)
        model = model_in_clip_space(model_config, tower, clip)
        precision = resolve_precision("align", config.precision, device)
        inherit_text_space(model, clip, train, store, config.seed, precision, out)
        del clip
        free_memory()
    else:
        model = LLM2CLIP(model_config, tower)
    if config.logit_scale == "inherit":
        model.set_logits(*read_pretrained_logits(config.tower))
    elif config.logit_scale is not None:
        model.set_logits(config.logit_scale)
    return model.to(device)


def _tuning_pairs(
    train: Sequence[Record], held_out: HeldOut, config: FitConfig, run_dir: Path
) -> list[list[TuningItem]]:
    """Return the tuning data of `fit`, or an empty list if tuning is disabled or already complete.

    The rows of other sources are counted separately, because the skip log of the run counts the rows of its images.
    """
    if config.tune.steps == 0 or (run_dir / "tune" / "encoder").exists():
        return []
    own_captions = [] if config.tune.data or config.tune.text_pairs else train
    excluded = [record for records in held_out.values() for record in records]
    has_other_sources = bool(config.tune.data or config.tune.text_pairs or config.tune.exclude)
    writes_log = has_other_sources and process_state().is_main_process
    log = SkipLog(run_dir / "skipped_tune.jsonl" if writes_log else None, config.max_skipped)
    pairs = read_tuning_sources(own_captions, excluded, config.tune, config.columns, log)
    if has_other_sources:
        print_once(f"tuning data: {log.summary()}")
    return pairs


def _measure_cra(
    captions: Sequence[Sequence[str]], encoder: EncoderConfig, loaded: CaptionEncoder | None = None
) -> dict[str, Any]:
    """Measure the caption retrieval accuracy of `loaded` or, if it is None, of a temporarily loaded encoder."""
    model = loaded or load_for_evaluation(device=process_state().device, **dataclasses.asdict(encoder))
    metrics = caption_retrieval_accuracy(captions, model)
    del model
    free_memory()
    return metrics


def _evaluate_from_store(
    model: LLM2CLIP, held_out: HeldOut, store: EmbeddingStore, log: SkipLog
) -> list[dict[str, Any]]:
    return evaluate_caption_fields(ModelEmbeddings(dual_encoder_from_store(model, store), log), held_out)


def _choose_query_templates(model: LLM2CLIP, ranked: Mapping[str, RetrievalRanks], log: SkipLog) -> dict[str, Any]:
    """Return the templates for short queries and their results (see `TemplateChoice`), and print what was chosen."""
    embeddings = ModelEmbeddings(from_llm2clip(model, "llm2clip"), log)
    try:
        choice = choose_query_templates(embeddings, next(iter(ranked.values())))
    except ValueError as error:
        print_once(f"Short queries are encoded without templates: {error}")
        return TemplateChoice(LITERAL, [], None).to_dict()
    print_once(choice.summary())
    return choice.to_dict()


def _save_model(model: LLM2CLIP, folder: Path, encoder: EncoderConfig | None) -> None:
    """Save a model with its caption encoder.

    If the encoder is a local folder and `encoder` does not override its saved settings, the folder is copied.
    """
    if encoder is None:
        model.save_pretrained(folder)
    elif encoder == EncoderConfig(path=encoder.path) and (Path(encoder.path) / "modules.json").is_file():
        model.save_pretrained(folder, text_folder=encoder.path)
    else:
        free_memory()  # the optimizer is no longer needed
        model.save_pretrained(folder, encoder=open_encoder(encoder, "cpu"))
    write_model_card(folder, folder.name)


def _write_report(run_dir: Path, model_dir: Path, trained: list[dict[str, Any]], data_summary: str) -> None:
    """Write the report and the model card of a `fit` run, and print a summary of the metrics."""
    cra_files = (run_dir / "tune" / "cra_raw.json", run_dir / "tune" / "cra_tuned.json")
    cra_before_after = [json.loads(file.read_text()) for file in cra_files if file.exists()]
    cra = (cra_before_after[0], cra_before_after[1]) if len(cra_before_after) == 2 else None
    evaluations = run_dir / "evaluate"
    templates_file = evaluations / "query_templates.json"
    untrained = json.loads((evaluations / "untrained.json").read_text())
    _, page = write_fit_report(
        run_dir,
        data=data_summary,
        cra=cra,
        untrained=untrained,
        trained=trained,
        query_templates=json.loads(templates_file.read_text()) if templates_file.exists() else None,
        examples=json.loads((evaluations / "examples.json").read_text()),
        curves={stage: read_metrics(run_dir / stage / "metrics.jsonl") for stage in ("tune", "align")},
        durations=json.loads((run_dir / DURATIONS_FILE).read_text()),
        settings=(run_dir / CONFIG_FILE).read_text(encoding="utf-8"),
    )
    write_model_card(model_dir, run_dir.resolve().name)
    print_once(to_markdown("Results", [summary_table(cra, untrained, trained)]), f"Report: {page}")
