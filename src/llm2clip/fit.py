"""The whole path as one command: records -> tune -> embed -> align -> evaluate.

A run folder holds everything a run made:

    RUN/
      recipe.yaml            the resolved settings; other settings in the same folder are refused
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

from llm2clip.checkpoints import read_metrics
from llm2clip.data.pairs import Item
from llm2clip.data.split import read_data, tuning_sources
from llm2clip.evaluate.captions import caption_accuracy
from llm2clip.evaluate.model import evaluate_model, validator, with_store
from llm2clip.evaluate.report import write_report
from llm2clip.evaluate.vectors import Vectors
from llm2clip.files import write_whole
from llm2clip.models.card import card
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text import CaptionEncoder
from llm2clip.processes import once, processes, say, typed
from llm2clip.recipes import FitRecipe
from llm2clip.stages import begin, fill, new_model, open_encoder, readable
from llm2clip.train.align import align
from llm2clip.train.steps import check_batch
from llm2clip.train.tune import tune


def fit(data: Sequence[str], out: Path, recipe: FitRecipe) -> Path:
    """Tune, embed, align, evaluate; returns the model folder. See `llm2clip fit --help`."""
    state = processes()
    log = begin(out, {"data": list(data), **dataclasses.asdict(recipe)}, recipe.max_skipped)
    records = read_data(data, recipe.evaluate, recipe.columns, log)
    say(records.summary, log.summary())

    captions = [r.captions for r in records.held_out["captions"]]
    # An LLM that is to be tuned in four bits is taken for one that the device cannot hold whole.
    measurable = sum(len(set(c)) > 1 for c in captions) > 1 and not recipe.tune.quantize
    check_batch(sum(r.image is not None for r in records.train), recipe.align, state.num_processes)
    encoder_folder = out / "tune" / "encoder"
    untuned = not encoder_folder.exists()
    state.wait_for_everyone()  # all have looked before anyone tunes
    tunes = recipe.tune.steps or recipe.tune.mntp_steps
    sources: list[list[Item]] = []
    if untuned and tunes:
        train = [] if recipe.tune.data or recipe.tune.pairs else records.train
        tested = [r for some in records.held_out.values() for r in some]
        sources = tuning_sources(train, tested, recipe.tune, recipe.columns, log)
    raw = open_encoder(recipe.encoder, recipe.tune) if untuned else None
    cra = []
    if measurable:
        cra.append(
            once(out / "evaluate/raw.json", lambda: caption_accuracy(captions, raw or open_encoder(recipe.encoder)))
        )
    if raw is not None:
        say("1/4 tune: the language model learns to tell captions apart")
        tune(sources, raw, recipe.tune, out / "tune")
        raw = None
    opening = partial(CaptionEncoder.from_pretrained, encoder_folder, attention=recipe.encoder.attention)
    if measurable:
        cra.append(once(out / "evaluate/tuned.json", lambda: caption_accuracy(captions, opening())))

    say("2/4 embed: every caption once into the store")
    everything = (t for r in [*records.train, *(r for f in records.held_out.values() for r in f)] for t in r.texts)
    store = fill(everything, opening, out / "store", recipe.embed)

    train = readable(records.train, store)
    held_out = {name: readable(some, store) for name, some in records.held_out.items()}

    say("3/4 align: the vision tower learns from the store")

    def measure(model: LLM2CLIP) -> list[dict[str, Any]]:
        return evaluate_model(Vectors(with_store(model, store), log, batch=recipe.evaluate.batch), held_out)

    gc.collect()  # the LLM's memory is free for the vision tower
    model_folder = out / "model"
    if not model_folder.exists():
        if state.is_main_process:
            (out / "evaluate/trained.json").unlink(missing_ok=True)  # of a model that was deleted since
        model = new_model(recipe.align, store)
        if state.is_main_process and not (out / "align/checkpoints").exists():
            (out / "evaluate/untrained.json").unlink(missing_ok=True)  # align's settings may have been mended
        once(out / "evaluate/untrained.json", lambda: measure(model))
        validate = validator(held_out, log, store, recipe.evaluate.batch)
        model = align(train, store, model, recipe.align, out / "align", log, validate)
        if state.is_main_process:
            model.save_pretrained(model_folder, text_folder=encoder_folder)
        state.wait_for_everyone()
    say("4/4 evaluate: on held-out images")
    model = LLM2CLIP.from_pretrained(model_folder)
    trained = once(out / "evaluate/trained.json", lambda: measure(model))
    if state.is_main_process:
        report, page = write_report(
            out,
            command=typed(),
            data=f"{records.summary}. {log.summary()}.",
            cra=(cra[0], cra[1]) if measurable else None,
            untrained=json.loads((out / "evaluate/untrained.json").read_text()),
            trained=trained,
            curves={s: read_metrics(out / s / "metrics.jsonl") for s in ("tune", "align")},
        )
        write_whole(model_folder / "README.md", card(model_folder, out.resolve().name))
        say(report.read_text(encoding="utf-8"), f"\nModel:  {model_folder}\nReport: {page}")
    return model_folder
