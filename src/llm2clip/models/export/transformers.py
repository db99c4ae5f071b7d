"""A model for the tools of Hugging Face: for transformers with one file of code, for sentence-transformers, or the bare
vision tower in its own class."""

from __future__ import annotations

import copy
import inspect
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm2clip.models import heads, lora
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.export import modeling_llm2clip
from llm2clip.models.export.modeling_llm2clip import LLM2CLIPExport, LLM2CLIPExportConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision_tower import VisionTower

POOLINGS = ("mean", "lasttoken", "cls")
CODE = "modeling_llm2clip.py"
TEXTS = (
    "a dog",
    "Two children in red jackets are playing in the snow while an old man watches them from a wooden bench.",
    "一只猫坐在窗台上",
)


def export_transformers(model: LLM2CLIP, folder: Path) -> None:
    """Write a folder that `AutoModel.from_pretrained(..., trust_remote_code=True)` opens without this package, and
    `AutoProcessor` its tokenizer and image processor.

    Args:
        model: with its caption encoder.
        folder: there already, and empty.

    Raises:
        ValueError: its caption encoder has a part that the form has no place for.
    """
    whole = build_export_model(model)
    whole.config.architectures = [LLM2CLIPExport.__name__]
    whole.config.auto_map = {
        "AutoConfig": f"modeling_llm2clip.{LLM2CLIPExportConfig.__name__}",
        "AutoModel": f"modeling_llm2clip.{LLM2CLIPExport.__name__}",
    }
    whole.config.save_pretrained(folder)
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in whole.state_dict().items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / CODE).write_text(standalone_source())
    build_tokenizer(model.encoder).save_pretrained(folder)
    processor = model.tower.preprocess.to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=1))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))


def export_sentence_transformers(model: LLM2CLIP, folder: Path) -> None:
    """The same folder, which `SentenceTransformer(..., trust_remote_code=True)` opens too; its `encode` takes texts and
    PIL images.

    Args, Raises: as of `to_transformers`.
    """
    export_transformers(model, folder)
    sides = {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
    }
    settings = {
        "transformer_task": "feature-extraction",
        "modality_config": sides,
        "module_output_name": "sentence_embedding",
    }
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings, indent=1))
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    modules = [{"idx": 0, "name": "0", "path": "", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(modules, indent=1))
    about = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about, indent=1))


def export_vision(model: LLM2CLIP, folder: Path) -> None:
    """The vision tower alone, without the projection, as transformers' own class (`CLIPVisionModel`,
    `SiglipVisionModel`, ...; for towers of timm `TimmWrapperModel`), which `AutoModel.from_pretrained` opens without
    code of ours. For models that look at patch features, as LLaVA does.

    Raises:
        ValueError: transformers has no class for the tower.
    """
    build_vision_model(model.tower).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))


# ---- what they share ------------------------------------------------------------------------------------------------


def build_vision_model(tower: VisionTower) -> Any:
    """The tower as a model of transformers' own, with weights of its own, on the CPU in float32 and eval mode."""
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel, TimmWrapperConfig, TimmWrapperModel

    config: dict[str, Any] = tower.config
    state = {name: tensor.detach().cpu() for name, tensor in tower.backbone.state_dict().items()}
    if config["library"] == "timm":
        args = {name: value for name, value in config["args"].items() if name != "num_classes"}
        own: Any = TimmWrapperConfig(architecture=config["architecture"], model_args=args)
        own.num_labels = 0
        model: Any = TimmWrapperModel(own)
        model.timm_model.load_state_dict(state)
        return model.float().eval()
    from transformers import AutoConfig

    own = AutoConfig.for_model(**config["architecture"])
    kinds: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    kind = kinds.get(own.model_type)
    model = kind(own) if kind else AutoModel.from_config(own)
    getattr(model, "vision_model", model).load_state_dict(state)  # one floor more, before transformers 5.3 or so
    return model.float().eval()


def build_export_model(model: LLM2CLIP) -> LLM2CLIPExport:
    """The model as one of transformers', with weights of its own, on the CPU in eval mode; LoRA is merged.

    Raises:
        ValueError: as of `to_transformers`.
    """
    encoder, c = model.encoder, model.config
    pooling = encoder.st[1].get_config_dict()["pooling_mode"]
    if pooling not in POOLINGS:
        raise ValueError(f"the caption encoder pools by {pooling!r}; this form has {', '.join(POOLINGS)}")
    if len(encoder.st) > 3:
        raise ValueError(f"the caption encoder has {len(encoder.st)} parts; this form has a place for three")
    st = copy.deepcopy(encoder.st).cpu()
    merged = CaptionEncoder(st)
    lora.merge_adapter(merged)
    llm = merged.llm.float()
    llm.set_attn_implementation("sdpa")
    text = {k: v for k, v in llm.config.to_dict().items() if k not in ("_name_or_path", "architectures", "dtype")}
    tower: dict[str, Any] = model.tower.config
    size = model.tower.preprocess.size
    shown = {
        "library": tower["library"],
        "architecture": tower["architecture"],
        "args": {**tower.get("args", {}), "num_classes": 0} if tower["library"] == "timm" else {},
        "width": model.tower.feature_dim,
        "image_size": size,
        "interpolates": tower["library"] == "transformers"
        and tower["architecture"]["model_type"] in ("clip_vision_model", "siglip_vision_model")
        and tower["architecture"]["image_size"] != size,
    }
    header = encoder.prompt_length(encoder.prefix)
    config = LLM2CLIPExportConfig(
        tower=shown,
        text=text,
        text_width=c.text_dim,
        width=c.embed_dim,
        adapter_depth=c.adapter_depth,
        adapter_expansion=c.adapter_expansion,
        normalize_input=c.normalize_input,
        projection_bias=c.projection_bias,
        pooling=pooling,
        logit_bias=c.logit_bias,
        header_tokens=0 if encoder.st[1].include_prompt else header,
    )
    whole = LLM2CLIPExport(config).float().eval()
    whole.vision.load_state_dict(model.tower.backbone.state_dict())
    whole.llm.load_state_dict(llm.state_dict())
    whole.projection.load_state_dict(model.projection.state_dict())
    whole.adapter.load_state_dict(model.adapter.state_dict())
    with torch.no_grad():
        whole.logit_scale.copy_(model.logit_scale[0])
        if model.logit_bias is not None and whole.logit_bias is not None:
            whole.logit_bias.copy_(model.logit_bias[0])
    _check(whole, model)
    return whole


@torch.inference_mode()
def _check(whole: LLM2CLIPExport, model: LLM2CLIP) -> None:
    """Raises ValueError if texts get other vectors than ours: the encoder has a part that this form has no place for,
    such as a layer of its own after the pooling."""
    tokenizer = build_tokenizer(model.encoder)
    batches = (tokenizer(text, truncation=True, return_tensors="pt") for text in TEXTS)
    found: list[Any] = [whole.get_text_features(**batch).pooler_output for batch in batches]
    least = float((torch.cat(found) * model.encode_text(TEXTS)).sum(1).min())
    if not least >= 0.9999:
        raise ValueError(
            f"in this form the caption encoder would give other vectors (cosine {least:.4f}): it has a part that the "
            "form has no place for"
        )


def build_tokenizer(encoder: CaptionEncoder) -> Any:
    """A tokenizer that puts the template around a text by itself.

    Raises:
        ValueError: a header in front of a text is not the tokens of both, one after the other.
    """
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.st.max_seq_length or 512
    if header := encoder.prefix:
        from tokenizers.processors import TemplateProcessing

        one, other = (encoder.tokenizer(header + text)["input_ids"] for text in ("a", "1"))
        before, after = _common(one, other), _common(one[::-1], other[::-1])[::-1]
        specials, pieces = [], ["$A"]
        for name, ids in (("<before>", before), ("<after>", after)):
            if ids:
                specials.append({"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)})
                pieces = [name, *pieces] if name == "<before>" else [*pieces, name]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join(pieces), special_tokens=specials
        )
        for text in ("a", "Two dogs, running.", "一只猫", "1"):
            if tokenizer(text)["input_ids"] != encoder.tokenizer(header + text)["input_ids"]:
                raise ValueError(f"the header {header!r} and {text!r} are other tokens together than one by one")
    return tokenizer


def _common(one: list[int], other: list[int]) -> list[int]:
    """What two lists begin with alike."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]


def standalone_source() -> str:
    """The code that a folder carries: ours, with the heads written out in the place of their import."""
    code = inspect.getsource(modeling_llm2clip)
    code_of_heads = "\n\n".join(inspect.getsource(part) for part in (heads.Block, heads.Adapter))
    imported = "from llm2clip.models.heads import Adapter\n"
    assert imported in code
    return code.replace(imported, "\n" + code_of_heads)
