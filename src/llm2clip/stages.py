"""The stages `tune`, `embed`, `align` and `evaluate`, on captions and records that have already been read.

`pipeline.py` reads the data and runs one or all of the stages in a run directory. Each stage writes its result
atomically and skips completed work.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, TuneConfig
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.pairs import TuningItem
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.reporting.error_analysis import collect_example_searches
from llm2clip.evaluate.retrieval import (
    RetrievalRanks,
    compute_field_metrics,
    dual_encoder_from_store,
    evaluate_caption_fields,
    make_validator,
    rank_caption_fields,
)
from llm2clip.evaluate.short_queries import ShortQueryResult, choose_query_templates
from llm2clip.models.dual_encoder import wrap_llm2clip
from llm2clip.models.export.model_card import write_model_card
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import save_query_templates
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.models.text.caption_encoder import CaptionEncoder, load_for_evaluation
from llm2clip.models.truncation import rotate_to_principal_components
from llm2clip.runs.ranks import load_or_compute_json, print_once, process_state, wait_for_everyone
from llm2clip.store.encode import embed as embed_locally
from llm2clip.store.layout import make_caption_keys
from llm2clip.store.ray_engine import embed_with_ray
from llm2clip.store.store import EmbeddingStore, drop_refused_captions
from llm2clip.train.align import align as train_align
from llm2clip.train.initial_model import PretrainedParts, create_initial_model
from llm2clip.train.tune import tune as train_tune

ROTATION_CAPTIONS = 4096  # number of captions from which the rotation of the embedding space is computed
HeldOut = Mapping[str, Sequence[Record]]  # held-out records, keyed by caption column


def tune(
    pairs: Sequence[Sequence[TuningItem]],
    out: Path,
    encoder: EncoderConfig,
    config: TuneConfig,
    held_out_captions: Sequence[Sequence[str]] = (),
) -> Path:
    """Tune the caption encoder on text pairs.

    Args:
        pairs: One list of image captions or text pairs per source (see `read_tuning_sources`).
        out: Output folder of this stage.
        encoder: Caption encoder to tune.
        held_out_captions: Captions of each held-out image. If at least two images have two or more distinct captions
            each, caption retrieval accuracy is measured before and after tuning, except with QLoRA. The results are
            saved in cra_raw.json and cra_tuned.json.

    Returns:
        The folder of the tuned caption encoder, `out/encoder`.
    """
    encoder_dir = out / "encoder"
    is_done = encoder_dir.exists()
    wait_for_everyone()  # every rank must check whether the folder exists before any rank creates it
    # QLoRA is for LLMs that do not fit on the device without quantisation, so the untuned LLM is not evaluated.
    measure = sum(len(set(captions)) > 1 for captions in held_out_captions) > 1 and not config.qlora
    # On a CPU, one encoder is evaluated and then tuned. A GPU evaluates in bf16, which requires a separate encoder.
    raw = open_encoder(encoder, "cpu") if process_state().device.type == "cpu" and not is_done else None
    if measure:
        load_or_compute_json(out / "cra_raw.json", lambda: _measure_cra(held_out_captions, encoder, raw))
    if not is_done:
        # Load the encoder on the CPU, so that a GPU holds only the weights in the training precision.
        train_tune(pairs, raw or open_encoder(encoder, "cpu"), config, out)
        del raw
        free_memory()  # the LLM is no longer needed
    if measure:
        load_or_compute_json(
            out / "cra_tuned.json", lambda: _measure_cra(held_out_captions, EncoderConfig(str(encoder_dir)))
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
    """Encode captions into an embedding store. Captions that are already in the store are skipped.

    Args:
        captions: Captions to encode. May contain duplicates.
        out: Folder of the embedding store.
        encoder: Frozen caption encoder.
        engine: "local" uses the ranks started by the launcher. "ray" uses a Ray cluster.
        ray_workers: Number of Ray workers. 0 means one worker per GPU or, if there are no GPUs, one per two CPU cores.
    """
    options = dataclasses.asdict(config)
    if engine == "ray":
        return embed_with_ray(captions, partial(open_encoder, encoder), out, workers=ray_workers, **options)
    # Load the encoder on the CPU, so that the GPU holds only the weights required for encoding.
    return embed_locally(captions, open_encoder(encoder, "cpu"), out, device=process_state().device, **options)


def align(
    train: RecordTable,
    store: EmbeddingStore,
    out: Path,
    config: AlignConfig,
    log: SkipLog,
    held_out: HeldOut | None = None,
    encoder: EncoderConfig | None = None,
    model_dir: Path | None = None,
    features: Path | None = None,
    parts: PretrainedParts | None = None,
) -> Path:
    """Train the vision tower, its projection and the adapter against the cached caption embeddings.

    Args:
        train: Training records. Their captions must be in the store, except for captions that the tokenizer could not
            encode. Phrases missing from the store are not used.
        store: Cached caption embeddings.
        out: Output folder of this stage.
        log: Log of images that cannot be decoded.
        held_out: Records on which to evaluate the model before and during training, keyed by caption column.
        encoder: Caption encoder to save with the model. If None, the model is saved without a caption encoder.
        model_dir: Folder in which to save the model. Default: `out/model`.
        features: Folder of the feature store, which caches the frozen tower's features and can be shared between runs.
            Default: a folder in `out`.
        parts: Pretrained parts of the model. If None, they are loaded.

    Returns:
        The model folder.
    """
    state = process_state()
    model_dir = model_dir or out / "model"
    if model_dir.exists():
        return model_dir
    free_memory()  # the LLM is no longer needed
    model = create_initial_model(config, store, train, out, parts)
    validate = None
    if held_out:
        held_out = _drop_unencodable_captions(held_out, store)
        evaluations = out.parent / "evaluate"
        if state.is_main_process:
            for name in ("trained.json", "query_templates.json", "examples.json"):  # metrics of an earlier model
                (evaluations / name).unlink(missing_ok=True)
            if not (out / "checkpoints").exists():
                (evaluations / "untrained.json").unlink(missing_ok=True)  # from a run with other `align` settings
        untrained = ModelEmbeddings(dual_encoder_from_store(model, store), log)
        load_or_compute_json(evaluations / "untrained.json", lambda: evaluate_caption_fields(untrained, held_out))
        validate = make_validator(held_out, log, store)
    model = train_align(train, store, model, config, out, log, validate, features)
    if state.is_main_process:
        is_trained_space = model.config.projection and model.config.adapter.depth > 0 and not config.inherit
        if is_trained_space and not config.matryoshka_dims:
            captions = _sample_caption_embeddings(train, store)
            if len(captions):
                rotate_to_principal_components(model, captions)
        _save_model(model, model_dir, encoder)
    wait_for_everyone()
    return model_dir


def evaluate(
    model_dir: Path, held_out: HeldOut, out: Path, log: SkipLog, store: EmbeddingStore
) -> list[dict[str, Any]]:
    """Evaluate a trained model's image-text retrieval on held-out images, with text embeddings from the store.

    If the model has a caption encoder, also choose prompt templates for short queries (see `choose_query_templates`).
    The templates are saved in the model's config and, together with their results, in `query_templates.json`.

    Args:
        held_out: Records on which to evaluate, keyed by caption column.
        out: Output folder. Metrics are saved as `trained.json`, and example searches as `examples.json`.
        log: Log of images that cannot be decoded.
        store: Store of caption embeddings, including those of the held-out captions.

    Returns:
        One row of metrics per caption column (see `evaluate_caption_fields`).
    """
    held_out = _drop_unencodable_captions(held_out, store)
    model = LLM2CLIP.from_pretrained(model_dir)
    embeddings = ModelEmbeddings(dual_encoder_from_store(model, store), log)
    ranked = cache(lambda: rank_caption_fields(embeddings, held_out))
    rows: list[dict[str, Any]] = load_or_compute_json(
        out / "trained.json", lambda: compute_field_metrics(embeddings, ranked())
    )
    if model.has_encoder:
        choice = load_or_compute_json(
            out / "query_templates.json", lambda: _choose_query_templates(model, ranked(), log)
        )
        if process_state().is_main_process:
            save_query_templates(model_dir, QueryTemplates.from_dict(choice))
    load_or_compute_json(out / "examples.json", lambda: collect_example_searches(next(iter(ranked().values()))))
    return rows


# ---- helpers ---------------------------------------------------------------------------------------------------------


def open_encoder(config: EncoderConfig, device: str | None = None) -> CaptionEncoder:
    """Load the caption encoder described by `config`. If `device` is None, load it on this rank's device."""
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(config), device=device)


def _drop_unencodable_captions(held_out: HeldOut, store: EmbeddingStore) -> HeldOut:
    """Remove captions that the tokenizer could not encode."""
    return {column: drop_refused_captions(records, store) for column, records in held_out.items()}


def _measure_cra(
    captions: Sequence[Sequence[str]], encoder: EncoderConfig, loaded: CaptionEncoder | None = None
) -> dict[str, Any]:
    """Measure caption retrieval accuracy with `loaded` or, if it is None, with a temporarily loaded encoder."""
    model = loaded or load_for_evaluation(device=process_state().device, **dataclasses.asdict(encoder))
    metrics = caption_retrieval_accuracy(captions, model)
    del model
    free_memory()
    return metrics


def _choose_query_templates(model: LLM2CLIP, ranked: Mapping[str, RetrievalRanks], log: SkipLog) -> dict[str, Any]:
    """Choose templates for short queries, print the choice, and return a `ShortQueryResult` as a dict."""
    embeddings = ModelEmbeddings(wrap_llm2clip(model, "llm2clip"), log)
    try:
        choice = choose_query_templates(embeddings, next(iter(ranked.values())))
    except ValueError as error:
        print_once(f"Short queries are encoded without templates: {error}")
        return ShortQueryResult(NO_TEMPLATES, []).to_dict()
    print_once(choice.describe_choice())
    return choice.to_dict()


def _sample_caption_embeddings(train: RecordTable, store: EmbeddingStore) -> Tensor:
    """Return the embeddings of one caption each of randomly chosen training records, of shape (N, text_dim)."""
    numbers = np.random.default_rng(0).permutation(len(train))[:ROTATION_CAPTIONS]
    texts = [record.texts[0] for record in (train[int(number)] for number in np.sort(numbers)) if record.texts]
    rows = store.find_keys(make_caption_keys(texts))
    return torch.from_numpy(store.take(rows[rows >= 0]))  # the tokenizer could not encode captions without a row


def _save_model(model: LLM2CLIP, folder: Path, encoder: EncoderConfig | None) -> None:
    """Save a model with its caption encoder.

    If the encoder is a local folder and `encoder` does not override its saved settings, the folder is copied.
    """
    if encoder is None:
        model.save_pretrained(folder)
    elif encoder == EncoderConfig(path=encoder.path) and (Path(encoder.path) / "modules.json").is_file():
        model.save_pretrained(folder, encoder=encoder.path)
    else:
        free_memory()  # the optimizer is no longer needed
        model.save_pretrained(folder, encoder=open_encoder(encoder, "cpu"))
    write_model_card(folder, folder.name)
