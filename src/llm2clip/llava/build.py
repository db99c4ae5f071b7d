"""A multimodal model of transformers' own classes: a vision tower, a two-layer projector, any causal LLM.

LLaVA-1.5 (arXiv 2310.03744): the projector turns patch features, those of the layer before the last, into tokens that
the LLM reads in the place of `<image>`. Towers of transformers go into `LlavaForConditionalGeneration`. Convolutional
towers of timm give their last feature map, which `FastVlmForConditionalGeneration` reads: the same projector and LLM.
Both are opened by `AutoModelForImageTextToText.from_pretrained` and `pipeline("image-text-to-text")` without this
package. timm's vision transformers, which no class of transformers reads, take a file of code in the folder
(`modeling_patches.py`), and with it `trust_remote_code=True` where this package is not imported.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm2clip.llava import modeling_patches
from llm2clip.llava.chat_template import IMAGE, answer_end_tokens, check_template, get_chat_template
from llm2clip.models.export.vision import build_vision_model
from llm2clip.models.pretrained import resolve_pretrained
from llm2clip.models.vision_tower import VisionTower


def build_llava(tower: VisionTower, llm: str, out: str | Path, seed: int = 0, pad: bool = True) -> Path:
    """Write an untrained multimodal model: whole, or not at all. Its projector is random, the rest is as it was, but
    that the tower takes the LLM's precision. What was written is opened again, and must say of a text what the LLM
    does.

    Args:
        tower: whose patch features the LLM will see.
        llm: folder, hub id, or name of `models/assets.py`, of a causal LLM with its tokenizer; its precision is kept.
        out: folder, not there yet.
        seed: of the projector.
        pad: pictures are padded to squares, as LLaVA-1.5's are; else a tower that was trained on the middle of pictures
            sees that alone.

    Raises:
        ValueError: the tower has no patch features that transformers' classes read; or the LLM has no head, or one that
            they have no place for.
        FileExistsError: `out` is there.
    """
    from transformers import AutoTokenizer

    out, llm = Path(out), resolve_pretrained(llm)
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose another place")
    tokenizer = AutoTokenizer.from_pretrained(llm, trust_remote_code=False)
    decoder = load_causal_llm(llm)
    ids = tokenizer("A photograph of a dog and two cats.", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = decoder(input_ids=ids).logits.float()
    model, processor = assemble_llava(tower, decoder, tokenizer, seed, pad)
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        save_llava(model, processor, tmp)
        del model, decoder
        _check(tmp, llm, ids, expected)
        os.replace(tmp, out)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return out


def _check(folder: Path, llm: str, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises ValueError if what is in the folder does not say of a text what the LLM does, or does not take a
    picture."""
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
    with torch.inference_mode():
        found = model(input_ids=ids).logits.float()[..., : expected.shape[-1]]
        close = 1e-3 if model.dtype == torch.float32 else 5e-2
        if found.shape != expected.shape or (found - expected).norm() > close * expected.norm():
            raise ValueError(
                f"{llm} has something that LLaVA's class in transformers has no place for (such as a bias or a scale "
                "of its logits): in it, it would say something else. Take another LLM"
            )
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        inputs = processor(images=Image.new("RGB", (64, 48)), text=IMAGE, return_tensors="pt")
        model(**inputs.to(model.dtype))


def save_llava(model: Any, processor: Any, folder: Path) -> None:
    """Write the parts of a model folder, with the file of code where its tower needs one."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if isinstance(model, modeling_patches.PatchLlava):
        code = Path(modeling_patches.__file__)
        (folder / code.name).write_text(code.read_text(encoding="utf-8"), encoding="utf-8")
        file = folder / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        config["auto_map"] = {
            "AutoConfig": f"{code.stem}.{modeling_patches.PatchLlavaConfig.__name__}",
            "AutoModelForImageTextToText": f"{code.stem}.{modeling_patches.PatchLlava.__name__}",
        }
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_causal_llm(name: str) -> Any:
    """A decoder with its head, in the precision that it was saved in.

    Raises:
        ValueError: it was saved without one.
    """
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(
        name, dtype="auto", trust_remote_code=False, output_loading_info=True
    )
    llm, report = found
    if report["missing_keys"]:
        raise ValueError(f"{name} is no whole causal LLM: it lacks {sorted(report['missing_keys'])[:3]}")
    return llm


def assemble_llava(tower: VisionTower, llm: Any, tokenizer: Any, seed: int = 0, pad: bool = True) -> tuple[Any, Any]:
    """The model and its processor, of parts that become its own; see `build`."""
    from transformers import GenerationConfig, LlavaImageProcessor, LlavaProcessor

    vision = _seeing(tower)
    patches, extra = _patches(vision, tower)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        llm.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    check_template(tokenizer)

    model = _whole(vision, llm, tokenizer, patches + extra, seed)
    generation = GenerationConfig.from_model_config(llm.config)
    own = llm.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *answer_end_tokens(tokenizer)]
    generation.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({end for end in ends if end is not None}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = generation
    side = tower.preprocess.size
    patch = side // math.isqrt(patches)
    if (side // patch) ** 2 != patches:  # this is how the processor counts them
        raise ValueError(f"{patches} features of {side} pixels are no square grid that transformers' processor counts")
    settings = tower.preprocess.to_dict() | {"image_processor_type": "LlavaImageProcessor"}
    settings["do_pad"] = pad and tower.preprocess.resize == "shortest"
    image_processor = LlavaImageProcessor.from_dict(settings)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default" if _has_class_token(vision) else "full",
        num_additional_image_tokens=extra + _has_class_token(vision),
        image_token=IMAGE,
        get_chat_template=get_chat_template(tokenizer),
    )
    return model.eval(), processor


def _whole(vision: Any, llm: Any, tokenizer: Any, tokens: int, seed: int) -> Any:
    """The parts in one model; nothing is initialised but the projector."""
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, LlavaConfig, LlavaForConditionalGeneration

    common: dict[str, Any] = {
        "vision_config": vision.config,
        "text_config": llm.config,
        "image_token_index": tokenizer.convert_tokens_to_ids(IMAGE),
        "image_seq_length": tokens,
        "tie_word_embeddings": llm.config.tie_word_embeddings,
    }
    kind: Any
    config: Any
    if isinstance(vision, modeling_patches.PatchTower):
        kind = modeling_patches.PatchLlava
        config = modeling_patches.PatchLlavaConfig(
            **common, vision_feature_layer=-2, vision_feature_select_strategy="full"
        )
    elif vision.config.model_type == "timm_wrapper":
        vision.config.hidden_size = vision.timm_model.num_features
        kind, config = FastVlmForConditionalGeneration, FastVlmConfig(**common)
    else:
        strategy: Any = "default" if _has_class_token(vision) else "full"
        config = LlavaConfig(**common, vision_feature_layer=-2, vision_feature_select_strategy=strategy)
        kind = LlavaForConditionalGeneration
    with torch.device("meta"):
        model = kind(config)
    model.model.vision_tower = vision
    model.model.language_model = llm.get_decoder()
    model.lm_head = llm.get_output_embeddings()
    torch.manual_seed(seed)
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(config)
    model.config.dtype = llm.dtype
    return model.to(llm.dtype)


def _seeing(tower: VisionTower) -> Any:
    """The tower as a model whose patch features LLaVA's classes read, in float32."""
    backbone: Any = tower.backbone
    if tower.config["library"] != "timm" or not hasattr(getattr(backbone, "patch_embed", None), "num_patches"):
        return build_vision_model(tower)
    args = {name: value for name, value in tower.config["args"].items() if name != "num_classes"}
    config = modeling_patches.PatchTowerConfig(
        architecture=tower.config["architecture"],
        model_args=args,
        hidden_size=backbone.embed_dim,
    )
    vision = modeling_patches.PatchTower(config)
    vision.timm_model.load_state_dict({name: t.detach().cpu() for name, t in backbone.state_dict().items()})
    return vision.float().eval()


def _patches(vision: Any, tower: VisionTower) -> tuple[int, int]:
    """How many patch features the LLM is to see of a picture, and how many tokens without a place beside them.

    Raises:
        ValueError: they are none that transformers' classes read.
    """
    size = tower.preprocess.size
    kind = vision.config.model_type
    if isinstance(vision, modeling_patches.PatchTower):
        try:
            with torch.inference_mode():
                patches = int(vision(torch.zeros(1, 3, size, size)).hidden_states[-2].shape[1])
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ValueError(f"{vision.config.architecture} does not give patches block by block: {error}") from error
        return patches, 0
    if kind == "timm_wrapper":
        with torch.inference_mode():
            last = vision(torch.zeros(1, 3, size, size)).last_hidden_state
        if last.ndim != 4 or last.shape[1] != vision.timm_model.num_features:
            raise ValueError(
                f"{vision.config.architecture} gives no map of features, channels first: take a convolutional net or a "
                "vision transformer of timm, or a CLIP, SigLIP or DINO tower of transformers"
            )
        return last.shape[2] * last.shape[3], 0
    if kind in ("clip_vision_model", "siglip_vision_model") and vision.config.image_size != size:
        _resize_positions(vision, size)
    return (size // vision.config.patch_size) ** 2, getattr(vision.config, "num_register_tokens", 0)


def _has_class_token(vision: Any) -> bool:
    return vision.config.model_type not in ("timm_wrapper", "siglip_vision_model", "llm2clip_patches")


def _resize_positions(vision: Any, size: int) -> None:
    """Position embeddings for another size than the tower's first, in the weights: LLaVA's classes resize none."""
    inner = getattr(vision, "vision_model", vision)
    embeddings = inner.embeddings
    old = embeddings.position_embedding.weight
    count = (size // vision.config.patch_size) ** 2
    beside = len(old) - (vision.config.image_size // vision.config.patch_size) ** 2
    dummy = torch.zeros(1, count + beside, old.shape[1])
    with torch.no_grad():
        new = embeddings.interpolate_pos_encoding(dummy, size, size)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(new.contiguous(), freeze=False)
    embeddings.image_size = vision.config.image_size = size
    embeddings.num_patches = count
    embeddings.num_positions = len(new)
    embeddings.register_buffer("position_ids", torch.arange(len(new)).expand((1, -1)), persistent=False)
