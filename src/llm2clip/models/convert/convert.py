"""Published LLM2CLIP checkpoints in, and our models out in their forms.

Reading is strict. Every tensor of a checkpoint is used once, or is one that we compute ourselves and that agrees, or
belongs to a part that is not needed; every parameter of ours is filled by a tensor of its shape. Nothing that a
checkpoint brings is run: weights are safetensors, or pickles of plain tensors read with `weights_only`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.convert.checkpoint_io import read_checkpoint
from llm2clip.models.convert.checkpoint_layout import (
    CLIP_FIELDS,
    EVA_ARGS,
    FORMS,
    Checkpoint,
    computed_buffers,
    format_shapes,
    infer_config,
    is_ignored_key,
    to_official_name,
)
from llm2clip.models.llm2clip import LLM2CLIP, is_model_folder
from llm2clip.models.vision_tower import VisionTower

# Which published language model an adapter of a width was trained with.
PAIRS = {
    4096: "microsoft/LLM2CLIP-Llama-3-8B-Instruct-CC-Finetuned",
    2048: "microsoft/LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned",
}
# How the published language models read a caption. They were saved without it.
TEMPLATE = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{caption}<|eot_id|>"
_SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


# ---- in -------------------------------------------------------------------------------------------------------------


def load_official(
    source: str | Path, *, text: str | Path | None = None, normalize_input: bool | None = None
) -> LLM2CLIP:
    """A published checkpoint as our model, in float32, on the CPU, in eval mode.

    Args:
        source: a folder or hub id with config.json and model.safetensors (also in shards), pytorch_model.bin, or one
            .pt file; or one such file of weights, whose architecture is read off its shapes.
        text: folder or hub id of the caption encoder that belongs to it; None leaves the model without.
        normalize_input: whether the adapter L2-normalises its input, where it is not as `config_of` says.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is not one, a tensor is missing, left over or of another shape, or `text` is not its pair.
    """
    checkpoint = Checkpoint.of(str(source), *read_checkpoint(source))
    config = infer_config(checkpoint, normalize_input)
    model = LLM2CLIP(config, VisionTower.from_config(config.tower)).eval()
    fill_weights(model, checkpoint)
    if text is not None:
        attach_caption_encoder(model, text)
    return model


@torch.no_grad()
def fill_weights(model: LLM2CLIP, checkpoint: Checkpoint) -> None:
    """Copy the tensors of a checkpoint into the model of its architecture.

    Raises:
        ValueError: a tensor is missing, left over, of another shape, or not as the architecture has it.
    """
    form, left = checkpoint.form, dict(checkpoint.tensors)
    missing: dict[str, Tensor] = {}
    wrong: list[str] = []
    found: list[tuple[Tensor, Tensor]] = []
    for name, own in model.state_dict().items():
        theirs = to_official_name(name, form, model.config.adapter_depth)
        tensor = left.pop(theirs, None)
        if tensor is None:
            missing[theirs] = own
        elif name == "logit_scale" and tensor.numel() == 1:
            found.append((own, tensor.reshape(own.shape)))
        elif tensor.shape != own.shape or not tensor.is_floating_point():
            wrong.append(f"{theirs} is {tensor.dtype} {tuple(tensor.shape)}, not floats {tuple(own.shape)}")
        else:
            found.append((own, tensor))
    for name, own in computed_buffers(model, form).items():
        tensor = left.pop(name, None)
        if tensor is not None and not _agree(own, tensor):
            wrong.append(f"{name} {tuple(tensor.shape)} is not what follows from the architecture")
    left = {name: tensor for name, tensor in left.items() if not is_ignored_key(name, form)}
    if missing or left or wrong:
        told = (
            [f"lacks {format_shapes(missing)}"] * bool(missing)
            + [f"has besides {format_shapes(left)}"] * bool(left)
            + wrong
        )
        raise ValueError(f"{checkpoint.where} does not fit the architecture of its form {form}: " + "; ".join(told))
    for own, tensor in found:
        own.copy_(tensor)


def _agree(own: Tensor, theirs: Tensor) -> bool:
    """The same numbers, to what bfloat16 leaves of a cosine."""
    return own.shape == theirs.shape and torch.allclose(theirs.to(own.dtype), own, rtol=0, atol=4e-3)


def attach_caption_encoder(model: LLM2CLIP, text: str | Path) -> CaptionEncoder:
    """Open a caption encoder and give it to the model; a published language model gets the template it was tuned with.

    Raises:
        ValueError: its vectors are not as wide as the adapter's input.
    """
    encoder = CaptionEncoder.from_pretrained(text, template=_template(text), device=model.device)
    wanted = model.config.text_dim
    if encoder.embed_dim != wanted:
        known = ", ".join(f"{width} is {name}" for width, name in PAIRS.items())
        raise ValueError(
            f"{text} gives vectors of width {encoder.embed_dim}, the adapter takes {wanted}: they are not a pair. "
            f"Give the caption encoder that the adapter was trained with; of the published ones, {known}"
        )
    model.set_encoder(encoder)
    return encoder


def _template(text: str | Path) -> str | None:
    """The official one for a bare language model with the tokens of Llama 3; else what the folder says."""
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    inner = Path(text) / "text"
    if (inner / "modules.json").is_file() or str(text).endswith(".gguf"):
        return None
    if cached_file(str(text), "modules.json", _raise_exceptions_for_missing_entries=False) is not None:
        return None
    vocabulary = AutoTokenizer.from_pretrained(str(text), trust_remote_code=False).get_vocab()
    return TEMPLATE if all(token in vocabulary for token in _SPECIAL) else None


# ---- out ------------------------------------------------------------------------------------------------------------


def save_official(model: LLM2CLIP, out: str | Path, form: str) -> Path:
    """Write a model under the names of the official code: whole, or not at all.

    Args:
        model: with a CLIP tower of transformers for "hf", one of timm's EVA-02 towers for CLIP for "eva".
        out: for "hf" a folder, in which model.safetensors, config.json and preprocessor_config.json come to lie; for
            "eva" a .pt file of plain tensors, those of the rotary embedding among them, as a strict load wants. It says
            nothing about how pictures are prepared: the official code brings the shortest side to the tower's size.
        form: "hf" or "eva".

    Raises:
        ValueError: the form has no place for something in the model.
        FileExistsError: `out` is there.
    """
    out = Path(out)
    _check_can(model, form)
    if form == "eva" and out.suffix != ".pt":
        raise ValueError(f"the form eva is one .pt file; {out} is not named so")
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another place")
    depth = model.config.adapter_depth
    tensors = {
        to_official_name(name, form, depth): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    if form == "eva":
        if not model.config.projection_bias:  # the official projection has one
            tensors["visual.head.bias"] = torch.zeros(model.config.embed_dim)
        tensors |= {name: tensor.cpu().clone() for name, tensor in computed_buffers(model, form).items()}
        torch.save(tensors, tmp)
    else:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir()
        architecture = model.tower.config["architecture"]
        vision = {"model_type": "clip_vision_model"} | {key: architecture[key] for key in CLIP_FIELDS}
        config = {"model_type": "clip", "projection_dim": model.config.embed_dim, "vision_config": vision}
        (tmp / "config.json").write_text(json.dumps(config, indent=1))
        (tmp / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
        save_file(tensors, tmp / "model.safetensors", {"format": "pt"})
    os.replace(tmp, out)
    return out


def _check_can(model: LLM2CLIP, form: str) -> None:
    config, tower = model.config, model.tower.config
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; there are {' and '.join(FORMS)}")
    kind = (
        tower["architecture"]["model_type"] if tower["library"] == "transformers" else f"timm:{tower['architecture']}"
    )
    if form == "hf":
        fits = kind == "clip_vision_model"
    else:
        fits = re.match("timm:eva02_(base|large)_.*_clip_", kind) is not None and tower["args"].keys() <= set(EVA_ARGS)
    no = []
    if not fits:
        wanted = (
            "a CLIP tower of transformers"
            if form == "hf"
            else "an EVA-02 tower for CLIP of timm, whose sizes alone may differ"
        )
        no.append(f"the tower is {kind}, the form takes {wanted}")
    elif form == "hf" and tower["architecture"]["image_size"] != model.tower.preprocess.size:
        no.append("the tower runs at another resolution than its position embeddings are for")
    if config.projection_bias and form == "hf":
        no.append("the projection has a bias")
    if config.logit_bias:
        no.append("the logits have a bias")
    if not config.normalize_input:
        no.append("the adapter does not normalise its input, as the official one does")
    if no:
        raise ValueError(f"this model cannot be written in the official form {form}: {'; '.join(no)}")


# ---- the command ----------------------------------------------------------------------------------------------------


def convert_verb(source: str, out: str, text: str | None = None, form: str | None = None) -> list[str]:
    """`llm2clip convert`: a published checkpoint to a model folder; with `form`, a model folder to an official form;
    with `text` alone, a model folder to one with that caption encoder. Returns lines to end with.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: as `load_official` and `save_official`; and `out` is there and is
            not a model folder.
    """
    ours = is_model_folder(source)
    if form is not None:
        if text is not None:
            raise ValueError("the official forms hold no caption encoder: leave out --text or --form")
        written = save_official(LLM2CLIP.from_pretrained(source, device="cpu"), out, form)
        return [f"Checkpoint in the official form {form}: {written}"]
    if ours and text is None:
        raise ValueError(f"{source} is a model folder already: say --form hf or eva, or --text ENCODER to add one")
    if Path(out).exists() and not is_model_folder(out):
        raise FileExistsError(f"{out} is there and is not a model folder; choose another place")
    if ours:
        model = LLM2CLIP.from_pretrained(source, device="cpu")
        if model.has_encoder:
            raise ValueError(
                f"{source} has a caption encoder, {Path(source) / 'text'}, which its adapter was trained on"
            )
        attach_caption_encoder(model, str(text))
    else:
        model = load_official(source, text=text)
    folder = model.save_pretrained(out)
    if model.has_encoder:
        return [f"Model: {folder}", f"Next: llm2clip evaluate {folder} DATA"]
    encoder = PAIRS.get(model.config.text_dim, f"an encoder of width {model.config.text_dim}")
    return [
        f"Model: {folder}",
        "It reads images and cached embeddings; for texts it needs the caption encoder that it was trained with.",
        f"Next: llm2clip convert {folder} --out {folder} --text ENCODER      ({encoder})",
    ]
