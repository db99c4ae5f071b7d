"""The whole path as one command: records -> tune -> embed -> align -> evaluate.

A run folder holds everything a run made:

    RUN/
      config.yaml            the resolved settings; other settings in the same folder are refused
      skipped.jsonl          rows and images that could not be used, with file and row
      tune/                  encoder/ (the tuned caption encoder), metrics.jsonl, checkpoints/
      store/                 every caption's embedding
      align/                 metrics.jsonl, evaluations.jsonl, checkpoints/, best/
      evaluate/              raw.json, tuned.json (CRA), untrained.json, trained.json (retrieval)
      model/                 the result
      report.md, report.html

A stage's result appears by a rename, so what is there is whole, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.checkpoint import read_metrics
from llm2clip.config import FitConfig
from llm2clip.data.pairs import TuningItem
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
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.pipeline import begin, fill, new_model, open_encoder, readable
from llm2clip.train.align import align
from llm2clip.train.align_data import check_batch
from llm2clip.train.tune import tune


def fit(data: Sequence[str], out: Path, config: FitConfig) -> Path:
    """Tune, embed, align, evaluate; returns the model folder. See `llm2clip fit --help`."""
    state = process_state()
    log = begin(out, {"data": list(data), **dataclasses.asdict(config)}, config.max_skipped)
    records = read_splits(data, config.evaluate, config.columns, log)
    print_once(records.summary, log.summary())

    captions = [r.captions for r in records.held_out["captions"]]
    # An LLM that is to be tuned in four bits is taken for one that the device cannot hold whole.
    measurable = sum(len(set(c)) > 1 for c in captions) > 1 and not config.tune.qlora
    check_batch(sum(r.image is not None for r in records.train), config.align, state.num_processes)
    encoder_folder = out / "tune" / "encoder"
    untuned = not encoder_folder.exists()
    state.wait_for_everyone()  # all have looked before anyone tunes
    tunes = config.tune.steps or config.tune.mntp_steps
    sources: list[list[TuningItem]] = []
    if untuned and tunes:
        train = [] if config.tune.data or config.tune.text_pairs else records.train
        tested = [r for some in records.held_out.values() for r in some]
        sources = read_tuning_sources(train, tested, config.tune, config.columns, log)
    raw = open_encoder(config.encoder, config.tune) if untuned else None
    cra = []
    if measurable:
        cra.append(
            cached_json(
                out / "evaluate/raw.json",
                lambda: caption_retrieval_accuracy(captions, raw or open_encoder(config.encoder)),
            )
        )
    if raw is not None:
        print_once("1/4 tune: the language model learns to tell captions apart")
        tune(sources, raw, config.tune, out / "tune")
        raw = None
    opening = partial(CaptionEncoder.from_pretrained, encoder_folder, attention=config.encoder.attention)
    if measurable:
        cra.append(cached_json(out / "evaluate/tuned.json", lambda: caption_retrieval_accuracy(captions, opening())))

    print_once("2/4 embed: every caption once into the store")
    everything = (t for r in [*records.train, *(r for f in records.held_out.values() for r in f)] for t in r.texts)
    store = fill(everything, opening, out / "store", config.embed)

    train = readable(records.train, store)
    held_out = {name: readable(some, store) for name, some in records.held_out.items()}

    print_once("3/4 align: the vision tower learns from the store")

    def measure(model: LLM2CLIP) -> list[dict[str, Any]]:
        return evaluate_caption_fields(
            ModelEmbeddings(dual_encoder_from_store(model, store), log), held_out
        )

    gc.collect()  # the LLM's memory is free for the vision tower
    model_folder = out / "model"
    if not model_folder.exists():
        if state.is_main_process:
            (out / "evaluate/trained.json").unlink(missing_ok=True)  # of a model that was deleted since
        model = new_model(config.align, store)
        if state.is_main_process and not (out / "align/checkpoints").exists():
            (out / "evaluate/untrained.json").unlink(missing_ok=True)  # align's settings may have been mended
        cached_json(out / "evaluate/untrained.json", lambda: measure(model))
        validate = make_validator(held_out, log, store)
        model = align(train, store, model, config.align, out / "align", log, validate)
        if state.is_main_process:
            model.save_pretrained(model_folder, text_folder=encoder_folder)
        state.wait_for_everyone()
    print_once("4/4 evaluate: on held-out images")
    model = LLM2CLIP.from_pretrained(model_folder)
    trained = cached_json(out / "evaluate/trained.json", lambda: measure(model))
    if state.is_main_process:
        report, page = write_fit_report(
            out,
            command=command_line(),
            data=f"{records.summary}. {log.summary()}.",
            cra=(cra[0], cra[1]) if measurable else None,
            untrained=json.loads((out / "evaluate/untrained.json").read_text()),
            trained=trained,
            curves={s: read_metrics(out / s / "metrics.jsonl") for s in ("tune", "align")},
        )
        atomic_write_text(model_folder / "README.md", render_model_card(model_folder, out.resolve().name))
        print_once(report.read_text(encoding="utf-8"), f"\nModel:  {model_folder}\nReport: {page}")
    return model_folder
