"""Export of models to the formats of transformers and sentence-transformers."""

import copy
import dataclasses
import json
import shutil
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentence_transformers.base.modules import Dense
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from torch import Tensor

from llm2clip.models import modeling_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import build_transformers_config
from llm2clip.models.modeling_llm2clip import LLM2CLIPExport, LLM2CLIPExportConfig, LLM2CLIPImageProcessor
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.latent_attention import LatentAttentionPooling
from llm2clip.models.vision.vision_tower import INTERPOLATES_ON_REQUEST, VisionTower

MAX_STATIC_TOKENS = 8192  # maximum text length of exported static encoders, in tokens
POOLINGS = ("mean", "lasttoken", "cls")
MIN_COSINE = 0.9999  # minimum cosine similarity between embeddings of the exported and original models
SAMPLE_TEXTS = (
    "a dog",
    "Two children in red jackets are playing in the snow while an old man watches them from a wooden bench.",
    "一只猫坐在窗台上",
)
# Texts for checking that the template does not change the tokens of a caption.
CHECKED_TEXTS = ("a", "Two dogs, running.", "一只猫", "1")


def export_transformers(model: LLM2CLIP, folder: Path) -> None:
    """Write a model folder that transformers can load without llm2clip, using `trust_remote_code=True`."""
    exported = build_exported_model(model)
    exported.config.architectures = [LLM2CLIPExport.__name__]
    module = Path(modeling_llm2clip.__file__).stem
    exported.config.auto_map = {
        "AutoConfig": f"{module}.{LLM2CLIPExportConfig.__name__}",
        "AutoModel": f"{module}.{LLM2CLIPExport.__name__}",
    }
    exported.config.save_pretrained(folder)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in exported.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(modeling_llm2clip.__file__, folder)
    build_tokenizer(model.encoder).save_pretrained(folder)
    processor_config = model.tower.preprocess.to_dict()
    if model.tower.preprocess.crop_rounding == "half_even":
        processor_config["auto_map"] = {"AutoImageProcessor": f"{module}.{LLM2CLIPImageProcessor.__name__}"}
    _write_json(folder / "preprocessor_config.json", processor_config)
    _write_json(folder / "processor_config.json", {"processor_class": "CLIPProcessor"})


def export_sentence_transformers(model: LLM2CLIP, folder: Path) -> None:
    """Write a model folder that sentence-transformers and transformers can load, using `trust_remote_code=True`."""
    export_transformers(model, folder)
    modalities = {
        "text": {"method": "get_text_features", "method_output_name": "pooler_output"},
        "image": {"method": "get_image_features", "method_output_name": "pooler_output"},
    }
    module_settings = {
        "transformer_task": "feature-extraction",
        "modality_config": modalities,
        "module_output_name": "sentence_embedding",
    }
    module_type = "sentence_transformers.base.modules.transformer.Transformer"
    model_settings = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine", "prompts": {}}
    _write_json(folder / "sentence_bert_config.json", module_settings)
    _write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": module_type}])
    _write_json(folder / "config_sentence_transformers.json", model_settings)


def export_vision_tower(model: LLM2CLIP, folder: Path) -> None:
    """Write the vision tower, without the projection, for models that need patch features, such as LLaVA.

    `AutoModel.from_pretrained` can load the vision tower without remote code.
    """
    build_vision_model(model.tower).save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", model.tower.preprocess.to_dict())


@torch.no_grad()
def build_exported_model(model: LLM2CLIP) -> LLM2CLIPExport:
    """Copy a model into a float32 transformers model on the CPU, in eval mode."""
    check_exportable_pooling(model.encoder)
    encoder = CaptionEncoder(copy.deepcopy(model.encoder.st).cpu().float())
    llm = encoder.llm
    llm.set_attn_implementation("sdpa")

    exported = LLM2CLIPExport(_build_export_config(model, llm)).float().eval()
    exported.vision.load_state_dict(model.tower.backbone.state_dict())
    exported.llm.load_state_dict(llm.state_dict())
    exported.projection.load_state_dict(model.projection.state_dict())
    exported.adapter.load_state_dict(model.adapter.state_dict())
    for exported_layer, layer in zip(exported.dense, _find_dense_layers(encoder), strict=True):
        exported_layer.load_state_dict(layer.linear.state_dict())
    exported.logit_scale.copy_(model.logit_scale[0])
    if model.logit_bias is not None and exported.logit_bias is not None:
        exported.logit_bias.copy_(model.logit_bias[0])
    _check_exported_model(exported, model)
    return exported


def check_exportable_pooling(encoder: CaptionEncoder) -> None:
    """Raise ValueError if the encoder is static, or if its pooling mode is not in `POOLINGS`."""
    if encoder.is_static:
        raise ValueError(
            "this format does not support static text encoders: use MODEL/text, which is a complete "
            "sentence-transformers model"
        )
    if isinstance(encoder.st[1], LatentAttentionPooling):
        raise ValueError("this format does not support the caption encoder's latent attention pooling")
    pooling = encoder.st[1].get_config_dict()["pooling_mode"]
    if pooling not in POOLINGS:
        raise ValueError(f"the caption encoder's pooling mode must be one of {', '.join(POOLINGS)} (got {pooling!r})")


def _build_export_config(model: LLM2CLIP, llm: Any) -> LLM2CLIPExportConfig:
    encoder, pooling = model.encoder, model.encoder.st[1]
    not_architecture = ("_name_or_path", "architectures", "dtype")
    return LLM2CLIPExportConfig(
        tower=_build_tower_config(model.tower),
        text={key: value for key, value in llm.config.to_dict().items() if key not in not_architecture},
        text_dim=model.config.text_dim,
        embed_dim=model.config.embed_dim,
        adapter=dataclasses.asdict(model.config.adapter),
        projection=model.config.projection,
        projection_bias=model.config.projection_bias,
        pooling=pooling.get_config_dict()["pooling_mode"],
        dense=[(layer.in_features, layer.out_features, layer.bias) for layer in _find_dense_layers(encoder)],
        prompt_tokens=0 if pooling.include_prompt else encoder.count_prompt_tokens(encoder.prefix),
        logit_bias=model.config.logit_bias,
    )


def _find_dense_layers(encoder: CaptionEncoder) -> list[Any]:
    # Dense layers with an activation function are detected by `check_text_embeddings`.
    return [module for module in encoder.st if isinstance(module, Dense)]


def _build_tower_config(tower: VisionTower) -> dict[str, Any]:
    library, architecture = tower.config["library"], tower.config["architecture"]
    is_timm = library == "timm"
    needs_flag = not is_timm and architecture["model_type"] in INTERPOLATES_ON_REQUEST
    return {
        "library": library,
        "architecture": architecture,
        "args": {**tower.config.get("args", {}), "num_classes": 0} if is_timm else {},
        "feature_dim": tower.feature_dim,
        "image_size": tower.preprocess.size,
        "interpolate_pos_encoding": needs_flag and architecture["image_size"] != tower.preprocess.size,
    }


@torch.inference_mode()
def _check_exported_model(exported: LLM2CLIPExport, model: LLM2CLIP) -> None:
    tokenizer = build_tokenizer(model.encoder)
    embeddings: list[Any] = []
    for text in SAMPLE_TEXTS:
        tokens = tokenizer(text, truncation=True, return_tensors="pt")
        embeddings.append(exported.get_text_features(**tokens).pooler_output)
    check_text_embeddings(torch.cat(embeddings), model)


def check_text_embeddings(embeddings: Tensor, model: LLM2CLIP) -> None:
    """Raise ValueError if an exported model's embeddings of `SAMPLE_TEXTS` differ from the original model's embeddings.

    The check detects caption encoder modules that the format cannot represent, such as activation functions.
    """
    cosine = float((embeddings * model.encode_text(SAMPLE_TEXTS)).sum(1).min())
    if not cosine >= MIN_COSINE:  # `not >=` also catches NaN
        raise ValueError(
            "the exported model's text embeddings would differ from those of the original model (cosine similarity "
            f"{cosine:.4f}): the caption encoder has a module that this format does not support"
        )


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1))


def build_vision_model(tower: VisionTower) -> Any:
    """Copy a vision tower into a float32 transformers model on the CPU, in eval mode.

    A timm tower becomes a `TimmWrapperModel`. A transformers tower keeps its model class, such as `CLIPVisionModel`.
    """
    from transformers import AutoModel, TimmWrapperConfig, TimmWrapperModel

    tensors = {name: tensor.detach().cpu() for name, tensor in tower.backbone.state_dict().items()}
    model: Any
    if tower.config["library"] == "transformers":
        model = AutoModel.from_config(build_transformers_config(tower.config["architecture"]))
        model.load_state_dict(tensors)
        return model.float().eval()
    args = {name: value for name, value in tower.config["args"].items() if name != "num_classes"}
    config: Any = TimmWrapperConfig(architecture=tower.config["architecture"], model_args=args)
    config.num_labels = 0
    model = TimmWrapperModel(config)
    model.timm_model.load_state_dict(tensors)
    return model.float().eval()


def build_tokenizer(encoder: CaptionEncoder) -> Any:
    """Return a copy of the encoder's tokenizer that also strips whitespace and adds the template's tokens."""
    from tokenizers import normalizers

    is_static = encoder.is_static
    tokenizer = _build_static_tokenizer(encoder.st[0]) if is_static else copy.deepcopy(encoder.tokenizer)
    backend = tokenizer.backend_tokenizer
    # `CaptionEncoder.tokenize` also strips leading and trailing whitespace.
    steps = [normalizers.Strip()] + ([] if backend.normalizer is None else [backend.normalizer])
    backend.normalizer = normalizers.Sequence(steps)
    _normalize_before_splitting(backend)
    if not is_static:
        tokenizer.model_max_length = encoder.st.max_seq_length or 512
    if encoder.prefix:
        _add_template_to_tokenizer(tokenizer, encoder)
        for text in CHECKED_TEXTS:
            if tokenizer(text)["input_ids"] != encoder.tokenizer(encoder.prefix + text)["input_ids"]:
                raise ValueError(
                    f"the template {encoder.prefix!r} is tokenized differently when followed by {text!r}. End "
                    "the template with a special token or a line break"
                )
    return tokenizer


def _normalize_before_splitting(backend: Any) -> None:
    """Make the tokenizer normalise each text before splitting the text at added tokens.

    By default, the segments between added tokens are normalised separately, so whitespace next to added tokens would be
    stripped. Added tokens that the normaliser would change, such as line breaks, are still split off first.
    """
    from tokenizers import AddedToken

    for token in backend.get_added_tokens_decoder().values():
        if backend.normalizer.normalize_str(token.content) == token.content:
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
            add = backend.add_special_tokens if token.special else backend.add_tokens
            add([AddedToken(token.content, normalized=True, **flags)])


def _build_static_tokenizer(static: StaticEmbedding) -> Any:
    """Return a transformers tokenizer that adds no special tokens, as in `StaticEmbedding`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    values = json.loads(static.tokenizer.to_str())
    values |= {"post_processor": None, "truncation": None, "padding": None}
    backend = Tokenizer.from_str(json.dumps(values))
    # Any token can be the padding token, because padding is masked.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=backend.id_to_token(0), model_max_length=MAX_STATIC_TOKENS
    )


def _add_template_to_tokenizer(tokenizer: Any, encoder: CaptionEncoder) -> None:
    from tokenizers.processors import TemplateProcessing

    first, second = (encoder.tokenizer(encoder.prefix + text)["input_ids"] for text in ("a", "1"))
    before = _find_common_leading_tokens(first, second)
    after = _find_common_leading_tokens(first[::-1], second[::-1])[::-1]
    special_tokens = []
    for name, ids in (("<before>", before), ("<after>", after)):
        if ids:
            special_tokens.append({"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)})
    template = " ".join((["<before>"] if before else []) + ["$A"] + (["<after>"] if after else []))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special_tokens)


def _find_common_leading_tokens(first: list[int], second: list[int]) -> list[int]:
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [token for token, _ in equal]
