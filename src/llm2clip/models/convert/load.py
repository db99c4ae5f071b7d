"""Loader that converts official checkpoints (released by the LLM2CLIP authors) to `LLM2CLIP` models.

Loading is strict. For every parameter of the model, the checkpoint must contain a tensor of the same shape. Every other
tensor in the checkpoint must either match a buffer that can be computed from the architecture, or have a name that the
layout ignores.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llm2clip.models.convert.checkpoint_io import read_checkpoint
from llm2clip.models.convert.checkpoint_layout import Checkpoint, compute_buffers, describe_tensors, official_name
from llm2clip.models.convert.infer_config import infer_config
from llm2clip.models.convert.peft_encoder import find_adapter, load_adapter_encoder
from llm2clip.models.convert.published_encoders import published_template, suggest_encoders
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower

# Buffers in official checkpoints may be stored in bfloat16, which changes cosines and sines by up to 2**-8.
BUFFER_TOLERANCE = 4e-3


def load_official_checkpoint(
    source: str | Path, *, text: str | Path | None = None, normalize_input: bool | None = None
) -> LLM2CLIP:
    """Load an official checkpoint in float32, on the CPU, in eval mode.

    Args:
        source: folder, hub id or weight file (see `read_checkpoint`). If there is no config.json, the architecture is
            inferred from the tensor shapes.
        text: caption encoder with which the adapter was trained (see `attach_caption_encoder`). Default: none.
        normalize_input: if True, the adapter L2-normalises its input. For the default, see `infer_config`.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint does not have an official layout. A tensor is missing, unexpected or of the wrong
            shape. The caption encoder does not match the adapter.
    """
    tensors, config, preprocess = read_checkpoint(source)
    checkpoint = Checkpoint.from_tensors(str(source), tensors, config, preprocess)
    model_config = infer_config(checkpoint, normalize_input)
    model = LLM2CLIP(model_config, VisionTower.from_config(model_config.tower)).eval()
    copy_tensors(model, checkpoint)
    if text is not None:
        attach_caption_encoder(model, text, source)
    return model


@torch.no_grad()
def copy_tensors(model: LLM2CLIP, checkpoint: Checkpoint) -> None:
    """Copy the tensors of a checkpoint into a model with the same architecture.

    Raises:
        ValueError: a tensor is missing, unexpected or of the wrong shape, or a buffer does not match the architecture.
    """
    pairs, problems = _match_tensors(model, checkpoint)
    if problems:
        raise ValueError(
            f"{checkpoint.source} does not match the layout {checkpoint.layout.name!r}: {'; '.join(problems)}"
        )
    for parameter, tensor in pairs:
        parameter.copy_(tensor)


def attach_caption_encoder(model: LLM2CLIP, path: str | Path, checkpoint: str | Path = "") -> None:
    """Load a caption encoder and attach it to the model.

    An LLM released with LLM2CLIP is used with the template with which it was tuned.

    Args:
        model: model without a caption encoder.
        path: folder or hub id of an encoder, or of a LoRA adapter in PEFT's format, which is merged into its LLM.
        checkpoint: name of the official checkpoint, for suggesting the right encoder in the error message.

    Raises:
        ValueError: the dimension of the encoder's embeddings differs from the adapter's input size.
    """
    if find_adapter(path) is not None:
        encoder = load_adapter_encoder([path], model.device)
    else:
        encoder = CaptionEncoder.from_pretrained(path, template=published_template(path), device=model.device)
    expected = model.config.text_dim
    if encoder.embed_dim != expected:
        suggested = suggest_encoders(checkpoint, expected, model.config.tower)
        published = f"Published encoder: {' or '.join(suggested)}"
        if not suggested:
            published = f"No published encoder has embeddings of size {expected}"
        raise ValueError(
            f"{path} has embeddings of size {encoder.embed_dim}, but the adapter's input size is {expected}. Pass the "
            f"caption encoder that the adapter was trained with. {published}"
        )
    model.set_encoder(encoder)


def _match_tensors(model: LLM2CLIP, checkpoint: Checkpoint) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Pair the parameters of a model with the tensors of a checkpoint.

    Returns:
        A list of (parameter, tensor) pairs, and a list of messages about missing, unexpected and mismatching tensors.
    """
    layout = checkpoint.layout
    unused = dict(checkpoint.tensors)
    pairs: list[tuple[Tensor, Tensor]] = []
    missing: dict[str, Tensor] = {}
    mismatches: list[str] = []

    for name, parameter in model.state_dict().items():
        official = official_name(name, layout, model.config.adapter.depth)
        tensor = unused.pop(official, None)
        if tensor is None:
            missing[official] = parameter
        elif name in ("logit_scale", "logit_bias") and tensor.numel() == 1:
            pairs.append((parameter, tensor.reshape(parameter.shape)))
        elif tensor.shape != parameter.shape or not tensor.is_floating_point():
            mismatches.append(
                f"{official} is {tensor.dtype} {tuple(tensor.shape)}, expected floating-point {tuple(parameter.shape)}"
            )
        else:
            pairs.append((parameter, tensor))

    for name, expected in compute_buffers(model, layout).items():
        tensor = unused.pop(name, None)
        if tensor is not None and not _is_close(tensor, expected):
            mismatches.append(f"{name} {tuple(tensor.shape)} does not match the architecture")

    unexpected = {name: tensor for name, tensor in unused.items() if not layout.ignored.match(name)}
    problems = []
    if missing:
        problems.append(f"missing {describe_tensors(missing)}")
    if unexpected:
        problems.append(f"unexpected {describe_tensors(unexpected)}")
    return pairs, problems + mismatches


def _is_close(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape:
        return False
    return torch.allclose(tensor.to(expected.dtype), expected, rtol=0, atol=BUFFER_TOLERANCE)
