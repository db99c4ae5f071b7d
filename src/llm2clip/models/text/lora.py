"""LoRA for the LLM of a caption encoder: training, and loading from folders with a separate adapter.

QLoRA (arXiv 2305.14314) stores the frozen matrices in 4 bits, but only during training. At the end, LoRA is merged into
the original weights. Without QLoRA, the frozen matrices can be stored in 16 bits. The merged weights are then based on
the rounded 16-bit values, which are exact if the LLM's weights were released in the same format.

The `tune` command always merges LoRA into the LLM. Version 0.1 could also save the adapter separately, and such folders
can still be loaded. A folder with a separate adapter contains the LoRA weights, the base LLM's name and the tuned LLM's
config. The config specifies the number of layers and whether attention is bidirectional. Because sentence-transformers
would ignore both settings and compute different embeddings, the folder's `modules.json` specifies the class
`LoraTransformer`.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.util import import_from_string
from torch import nn
from transformers import AutoConfig

from llm2clip.extras import install_command
from llm2clip.models.hub.loading import WITHOUT_HUB_CODE
from llm2clip.models.hub.pretrained import cache_dir

ADAPTER_CONFIG = "adapter_config.json"


class LoraSession:
    """LoRA training of an encoder's LLM. The constructor adds LoRA, and `finish` merges it."""

    def __init__(self, encoder: Any, config: LoraConfig, dtype: torch.dtype, device: torch.device, quantize: bool):
        """Add LoRA to the encoder's LLM, in place.

        Args:
            encoder: a `CaptionEncoder` whose LLM has no LoRA yet.
            config: LoRA config for PEFT.
            dtype: dtype of the frozen matrices or, with `quantize`, of the matmuls with them.
            device: training device.
            quantize: if True, store the frozen matrices in 4 bits (QLoRA, requires bitsandbytes). The original matrices
                stay on the CPU.

        If the LLM is initially on the CPU, its float32 weights do not have to fit in the device's memory.
        """
        self.encoder, self.config = encoder, config
        transformer = encoder.st[0]
        self.original_layers = _quantize_linear_layers(transformer.model, dtype, device) if quantize else {}
        transformer.model = get_peft_model(transformer.model, config)
        if not quantize:
            cast_frozen_linear(transformer.model, dtype)
        transformer.model.to(device)

    def finish(self) -> None:
        """Merge LoRA into the original weights, in place and in float32, on the CPU.

        The CPU is used because the float32 weights may not all fit on the device.
        """
        transformer = self.encoder.st[0]
        model = transformer.model
        model = self._restore_original_layers(model) if self.original_layers else model.to("cpu")
        cast_frozen_linear(model, torch.float32)  # in 16 bits, LoRA's small updates would be rounded
        transformer.model = model.merge_and_unload()
        self.encoder.to("cpu")

    def _restore_original_layers(self, model: Any) -> Any:
        """Move the trained LoRA weights from the quantised LLM to the original LLM on the CPU."""
        lora_weights = {name: weight.cpu() for name, weight in get_peft_model_state_dict(model).items()}
        llm = model.unload().to("cpu")
        for name, layer in self.original_layers.items():
            llm.set_submodule(name, layer)
        llm.is_loaded_in_4bit = False
        model = get_peft_model(llm, self.config)
        set_peft_model_state_dict(model, lora_weights)
        return model


def merge_adapter(encoder: Any) -> None:
    """Merge the separate LoRA adapter of an encoder saved by version 0.1 into the encoder's LLM, in place."""
    transformer = encoder.st[0]
    if isinstance(transformer.model, PeftModel):
        transformer.model, transformer.__class__ = transformer.model.merge_and_unload(), Transformer


def check_qlora_available() -> None:
    """Raise ModuleNotFoundError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"--tune.qlora requires the package bitsandbytes: {install_command('qlora')}")


def cast_frozen_linear(llm: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen linear layers to `dtype`.

    Norms and token embeddings are not cast, because their rounding errors would affect all later layers.
    """
    for module in llm.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(dtype)


def _quantize_linear_layers(llm: Any, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Replace the linear layers with 4-bit layers on `device`.

    Returns:
        The original layers, on the CPU, keyed by name.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    original_layers = {name: module.to("cpu") for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in original_layers.items():
        has_bias = layer.bias is not None
        quantized = Linear4bit(layer.in_features, layer.out_features, has_bias, compute_dtype=dtype, quant_type="nf4")
        quantized.weight = Params4bit(layer.weight.data.clone(), requires_grad=False, quant_type="nf4")
        if has_bias:
            quantized.bias = nn.Parameter(layer.bias.data.clone(), requires_grad=False)
        llm.set_submodule(name, quantized.to(device))
    llm.is_loaded_in_4bit = True  # PEFT checks this attribute
    return original_layers


# ---- folders with a separate adapter --------------------------------------------------------------------------------


class LoraTransformer(Transformer):
    """sentence-transformers module for an LLM with a separate LoRA adapter.

    A saved folder contains the tuned LLM's config. The folder's `modules.json` contains the import path of this class.
    """

    model: Any

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.model = PeftModel.from_pretrained(self.model, model_name_or_path)

    @staticmethod
    def _load_config(model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return AutoConfig.from_pretrained(model_name_or_path, **config_kwargs), False

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        base = str(PeftConfig.from_pretrained(model_name_or_path).base_model_name_or_path)
        if Path(base).is_absolute() and not Path(base).is_dir():
            # The adapter was saved on another machine, but this machine's download cache may contain the LLM.
            cached_base = cache_dir() / Path(base).name
            if cached_base.is_dir():
                base = str(cached_base)
        try:
            return super()._load_model(base, *args, **kwargs)
        except OSError as error:
            raise OSError(
                f"{model_name_or_path} contains a LoRA adapter for {base}, which cannot be loaded: {error}\n"
                f"Set base_model_name_or_path in the adapter's {ADAPTER_CONFIG} to the LLM's current folder"
            ) from error

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Save the adapter and the LLM's config. If the LLM is a local folder, save its absolute path."""
        super().save(output_path, *args, **kwargs)
        self.model.get_base_model().config.save_pretrained(output_path)
        file = Path(output_path) / ADAPTER_CONFIG
        config = json.loads(file.read_text())
        base = Path(config["base_model_name_or_path"])
        if base.is_dir():
            config["base_model_name_or_path"] = str(base.resolve())
            file.write_text(json.dumps(config, indent=1))


_MODULE_TYPE = f"{LoraTransformer.__module__}.{LoraTransformer.__name__}"  # import path in modules.json


def is_lora_folder(folder: str | Path) -> bool:
    """Return True if a folder contains a separate LoRA adapter in the layout described at the top of this module.

    Raises:
        ValueError: the folder contains an adapter that was saved by PEFT alone and therefore lacks the LLM's config and
            the pooling settings.
    """
    modules_file = Path(folder) / "modules.json"
    if (Path(folder) / ADAPTER_CONFIG).is_file() and not modules_file.is_file():
        raise ValueError(
            f"{folder} contains only a PEFT adapter. Merge it into its LLM and use the result: "
            f"llm2clip convert {folder} --out ENCODER"
        )
    if not modules_file.is_file():
        return False
    return bool(json.loads(modules_file.read_text())[0]["type"] == _MODULE_TYPE)


def load_lora(folder: str | Path, device: str | None) -> SentenceTransformer:
    """Load a model from a folder that stores a LoRA adapter separately. The LLM is loaded in float32.

    Raises:
        OSError: the adapter's weights or the LLM cannot be found.
        ValueError: the folder requires code that is not part of sentence-transformers.
    """
    folder = Path(folder)
    module_entries = json.loads((folder / "modules.json").read_text())
    if not (folder / "adapter_model.safetensors").is_file():
        raise OSError(f"{folder} has no adapter_model.safetensors")
    model_kwargs = {"dtype": torch.float32, **WITHOUT_HUB_CODE}
    transformer = LoraTransformer.load(str(folder), model_kwargs=model_kwargs, trust_remote_code=False)
    modules: list[nn.Module] = [transformer]
    for entry in module_entries[1:]:
        if not entry["type"].startswith("sentence_transformers."):
            raise ValueError(f"{folder}/modules.json: {entry['type']} is not part of sentence-transformers")
        module_class: Any = import_from_string(entry["type"])
        modules.append(module_class.load(str(folder), subfolder=entry["path"]))
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    return SentenceTransformer(
        modules=modules,
        device=device,
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
    )
