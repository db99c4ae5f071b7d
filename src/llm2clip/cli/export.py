"""`llm2clip convert`, `export` and `push`: models in other forms, in and out."""

from __future__ import annotations

from jsonargparse import Namespace

from llm2clip.cli.commands import Commands


def add(commands: Commands) -> None:
    """The verbs of this file."""
    sub = commands.add("convert", _convert, "Published LLM2CLIP checkpoints to model folders, and back.")
    sub.add_argument("source", type=str, help="official folder, file or hub id; or a model folder")
    sub.add_argument("--out", type=str, required=True, help="model folder, or what to write in an official form")
    sub.add_argument("--text", type=str, help="caption encoder that the checkpoint's adapter was trained with")
    sub.add_argument("--form", choices=["hf", "eva"], help="write a model folder in this official form")
    sub = commands.add(
        "export", _export, "A model for other tools: transformers, sentence-transformers, ONNX, open_clip."
    )
    sub.add_argument("model", type=str, help="model folder or hub id")
    sub.add_argument(
        "--to", choices=["transformers", "sentence-transformers", "vision", "onnx", "open_clip"], required=True,
        help="the form; vision is the bare tower, for LLaVA and its kin",
    )  # fmt: skip
    sub.add_argument("--out", type=str, required=True, help="folder")
    sub.add_argument("--int8", action="store_true", help="onnx: with weights rounded to bytes, too")
    sub = commands.add("push", _push, "A model folder, or an exported one, to the hub, with a model card.")
    sub.add_argument("model", type=str, help="folder")
    sub.add_argument("name", type=str, help="USER/NAME on the hub")
    sub.add_argument("--private", action="store_true", help="if it is made anew")
    sub.add_argument("--license", type=str, help="as the hub calls it, such as apache-2.0")


def _convert(given: Namespace) -> list[str]:
    from llm2clip.models.convert.convert import convert_verb

    return convert_verb(given.source, given.out, given.text, given.form)


def _export(given: Namespace) -> list[str]:
    from llm2clip.models.export.verb import export_verb

    return export_verb(given.model, given.to, given.out, given.int8)


def _push(given: Namespace) -> list[str]:
    from llm2clip.models.export.verb import push_verb

    return push_verb(given.model, given.name, given.private, given.license)
