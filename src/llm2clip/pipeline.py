"""The four stages (tune, embed, align, evaluate), and `fit`, which runs all of them in this order.

The command line and `reproduce` call the same functions. Each stage writes its result atomically and skips work that
is already done, so running the same command again resumes the run. Layout of a run directory:

    RUN/
      config.yaml            all settings; on resuming, changes that affect the result are rejected
      skipped.jsonl          rows and images that could not be used, with file and row
      tune/                  encoder/ (the tuned caption encoder), metrics.jsonl, cra_*.json, checkpoints/
      store/                 the embedding of every caption
      align/                 metrics.jsonl, evaluations.jsonl, checkpoints/, best/, features-*/ (if the tower is frozen)
      evaluate/              untrained.json and trained.json: retrieval before and after alignment
      model/                 the trained model
      report.md, report.html
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from llm2clip.checkpoint import read_metrics
from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.data.pairs import TuningItem
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits
from llm2clip.data.tuning_sources import read_tuning_sources
from llm2clip.distributed import cached_json, command_line, print_once, process_state
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.reporting.fit_report import write_fit_report
from llm2clip.evaluate.retrieval_eval import dual_encoder_from_store, evaluate_caption_fields, make_validator
from llm2clip.io_utils import atomic_write_text
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.export.model_card import render_model_card
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.run_config import save_or_check_config
from llm2clip.store.encode import embed as embed_locally
from llm2clip.store.ray_engine import embed_with_ray
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align as train_align
from llm2clip.train.sampling import check_batch_size
from llm2clip.train.tune import tune as train_tune

HeldOut = Mapping[str, Sequence[Record]]  # caption column -> records


def fit(sources: Sequence[str], run_dir: Path, config: FitConfig) -> Path:
    """Run all stages on captioned images.

    Args:
        sources: data sources, each PATH or PATH@split+split, see `llm2clip.data.records.Source`.
        run_dir: run directory; if it holds an interrupted run, the run is resumed.
        config: settings for all stages.

    Returns:
        The model folder.

    Raises:
        ConfigChangedError: the run directory was created with different settings.
        TooManySkipped: more than `config.max_skipped` of the rows cannot be used.
        ValueError: the data is too small for the settings, or contains no captions to learn from.
    """
    log = start_run(run_dir, {"data": list(sources), **dataclasses.asdict(config)}, config.max_skipped)
    data = read_splits(sources, config.evaluate, config.columns, log)
    print_once(data.summary, log.summary())
    check_batch_size(sum(r.image is not None for r in data.train), config.align, process_state().num_processes)

    print_once("1/4 tune: contrastive training of the language model on captions")
    pairs = _tuning_pairs(data.train, data.held_out, config, run_dir / "tune", log)
    held_out_captions = [record.captions for record in data.held_out["captions"]]
    encoder = EncoderConfig(path=str(tune(pairs, run_dir / "tune", config.encoder, config.tune, held_out_captions)))

    print_once("2/4 embed: encoding every caption into the store")
    records = [*data.train, *(record for column in data.held_out.values() for record in column)]
    store = embed((text for r in records for text in r.texts), run_dir / "store", encoder, config.embed)

    print_once("3/4 align: training the vision tower against the store")
    train = drop_refused_captions(data.train, store)
    held_out = {column: drop_refused_captions(records, store) for column, records in data.held_out.items()}
    model_dir = align(train, store, run_dir / "align", config.align, log, held_out, encoder, run_dir / "model")

    print_once("4/4 evaluate: retrieval on held-out images")
    trained = evaluate(model_dir, held_out, run_dir / "evaluate", log, store)
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
        pairs: image captions or text pairs, one list per source, see `read_tuning_sources`.
        out: output folder of this stage.
        encoder: the encoder to start from.
        config: settings for this stage.
        held_out_captions: captions of each held-out image. If at least two images have two distinct captions, caption
            retrieval accuracy is measured before and after tuning and saved in cra_raw.json and cra_tuned.json.

    Returns:
        The folder of the tuned caption encoder, `out/encoder`.
    """
    encoder_dir = out / "encoder"
    is_done = encoder_dir.exists()
    process_state().wait_for_everyone()  # every rank must check for the folder before any rank creates it
    # QLoRA is meant for LLMs that do not fit on the device unquantised, so the raw LLM is not evaluated.
    measure = sum(len(set(captions)) > 1 for captions in held_out_captions) > 1 and not config.qlora
    raw = None if is_done else open_encoder(encoder, device="cpu" if config.qlora else None)
    if measure:
        cached_json(
            out / "cra_raw.json",
            lambda: caption_retrieval_accuracy(held_out_captions, raw or open_encoder(encoder)),
        )
    if raw is not None:
        train_tune(pairs, raw, config, out)
        del raw
    if measure:
        cached_json(
            out / "cra_tuned.json",
            lambda: caption_retrieval_accuracy(held_out_captions, CaptionEncoder.from_pretrained(encoder_dir)),
        )
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
    """Encode captions into a store, skipping captions that are already in the store.

    Args:
        captions: captions to encode; duplicates are allowed.
        out: store folder.
        encoder: the frozen caption encoder.
        config: settings for this stage.
        engine: "local" runs on the ranks that the launcher started; "ray" runs on a Ray cluster.
        ray_workers: number of Ray workers; 0 means one per GPU or, without a GPU, one per two CPU cores.
    """
    options = dataclasses.asdict(config)
    if engine == "ray":
        return embed_with_ray(captions, partial(open_encoder, encoder), out, workers=ray_workers, **options)
    return embed_locally(captions, open_encoder(encoder), out, **options)


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
        train: records whose captions are in the store.
        store: cached caption embeddings.
        out: output folder of this stage.
        config: settings for this stage.
        log: skip log for images that cannot be decoded.
        held_out: records to evaluate on before, during and after training, keyed by caption column.
        encoder: caption encoder to save with the model; None saves the model without a caption encoder.
        model_dir: folder to save the model in. Default: `out/model`.
        features: store for the frozen tower's features; several runs may share it. Default: a folder in `out`.

    Returns:
        The model folder.
    """
    state = process_state()
    model_dir = model_dir or out / "model"
    if model_dir.exists():
        return model_dir
    gc.collect()  # free the LLM's memory before the vision tower is loaded
    model = new_model(config, store)
    validate = None
    if held_out:
        evaluations = out.parent / "evaluate"
        if state.is_main_process:
            (evaluations / "trained.json").unlink(missing_ok=True)  # from an earlier model
            if not (out / "checkpoints").exists():  # the align settings may have changed since the last run
                (evaluations / "untrained.json").unlink(missing_ok=True)
        cached_json(evaluations / "untrained.json", lambda: _evaluate_from_store(model, held_out, store, log))
        validate = make_validator(held_out, log, store)
    model = train_align(train, store, model, config, out, log, validate, features)
    if state.is_main_process:
        _save_model(model, model_dir, encoder)
    state.wait_for_everyone()
    return model_dir


def evaluate(
    model_dir: Path, held_out: HeldOut, out: Path, log: SkipLog, store: EmbeddingStore
) -> list[dict[str, Any]]:
    """Evaluate the retrieval of a trained model on held-out images, with text embeddings from the store.

    Args:
        model_dir: model folder.
        held_out: records to evaluate on, keyed by caption column.
        out: output folder of this stage; the result is saved in `trained.json`.
        log: skip log for images that cannot be decoded.
        store: store that contains the embeddings of the held-out captions.

    Returns:
        One row per caption column, see `evaluate_caption_fields`.
    """
    model = LLM2CLIP.from_pretrained(model_dir)
    rows: list[dict[str, Any]] = cached_json(
        out / "trained.json", lambda: _evaluate_from_store(model, held_out, store, log)
    )
    return rows


# ---- shared by the stages and the command line ---------------------------------------------------------------------


def start_run(run_dir: Path, config: dict[str, Any], max_skipped: float) -> SkipLog:
    """Save the run config, or raise if the run directory has a different one. Return the skip log."""
    is_main = process_state().is_main_process
    if is_main:
        save_or_check_config(config, run_dir)
    return SkipLog(run_dir / "skipped.jsonl" if is_main else None, max_skipped)


def open_encoder(config: EncoderConfig, device: str | None = None) -> CaptionEncoder:
    """Load the caption encoder that a config describes. Default device: this rank's device."""
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(config), device=device)


def new_model(config: AlignConfig, store: EmbeddingStore) -> LLM2CLIP:
    """Create an untrained model from a pretrained tower and heads initialised with the config's seed."""
    torch.manual_seed(config.seed)
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    tower.freeze_norm = True  # keep the pretrained batch-norm statistics
    model_config = LLM2CLIPConfig.from_config(config, tower.config, store.embed_dim, store.manifest["identity"])
    return LLM2CLIP(model_config, tower).to(process_state().device)


def _tuning_pairs(
    train: Sequence[Record], held_out: HeldOut, config: FitConfig, out: Path, log: SkipLog
) -> list[list[TuningItem]]:
    """Return the text pairs that `fit` tunes on, or an empty list if tuning is off or already done."""
    if config.tune.steps == 0 or (out / "encoder").exists():
        return []
    own_captions = [] if config.tune.data or config.tune.text_pairs else train
    excluded = [record for records in held_out.values() for record in records]
    return read_tuning_sources(own_captions, excluded, config.tune, config.columns, log)


def _evaluate_from_store(
    model: LLM2CLIP, held_out: HeldOut, store: EmbeddingStore, log: SkipLog
) -> list[dict[str, Any]]:
    return evaluate_caption_fields(ModelEmbeddings(dual_encoder_from_store(model, store), log), held_out)


def _save_model(model: LLM2CLIP, folder: Path, encoder: EncoderConfig | None) -> None:
    """Save a model with its caption encoder. An encoder folder with unchanged settings is copied."""
    if encoder is None:
        model.save_pretrained(folder)
    elif encoder == EncoderConfig(path=encoder.path) and (Path(encoder.path) / "modules.json").is_file():
        model.save_pretrained(folder, text_folder=encoder.path)
    else:
        model.save_pretrained(folder, encoder=open_encoder(encoder))


def _write_report(run_dir: Path, model_dir: Path, trained: list[dict[str, Any]], data_summary: str) -> None:
    """Write the report and the model card for a `fit` run, and print the report."""
    cra_files = (run_dir / "tune" / "cra_raw.json", run_dir / "tune" / "cra_tuned.json")
    cra = [json.loads(file.read_text()) for file in cra_files if file.exists()]
    report, page = write_fit_report(
        run_dir,
        command=command_line(),
        data=data_summary,
        cra=(cra[0], cra[1]) if len(cra) == 2 else None,
        untrained=json.loads((run_dir / "evaluate" / "untrained.json").read_text()),
        trained=trained,
        curves={stage: read_metrics(run_dir / stage / "metrics.jsonl") for stage in ("tune", "align")},
    )
    atomic_write_text(model_dir / "README.md", render_model_card(model_dir, run_dir.resolve().name))
    print_once(report.read_text(encoding="utf-8"), f"\nReport: {page}")
