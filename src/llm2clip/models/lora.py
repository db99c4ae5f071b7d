"""LoRA on a caption encoder's LLM: while it trains, with the LLM in 16 or 4 bits, and as a folder of its own.

QLoRA (arXiv 2305.14314) holds the matrices that LoRA leaves alone in 4 bits. They are rounded for the training only:
what LoRA's changes are added to, or kept beside, is the LLM as it was.

A folder that keeps LoRA apart holds its weights, the name of the LLM they belong to, and the LLM's configuration, for
two settings of it would be lost otherwise: attention in both directions and the number of blocks. sentence-transformers
would open it without them and give other vectors, so its `modules.json` asks for `LoraTransformer`.
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

ADAPTER = "adapter_config.json"


class Training:
    """An LLM with LoRA on it, from here to `finish`."""

    def __init__(self, encoder: Any, config: LoraConfig, dtype: torch.dtype, device: torch.device, four_bits: bool):
        """Put LoRA on.

        Args:
            encoder: a caption encoder; changed in place.
            config: of LoRA.
            dtype: of the matrices that are not trained, or of the products with them.
            device: that of the training.
            four_bits: hold those matrices in 4 bits; the whole ones wait on the CPU, where the LLM may be until now.

        Raises:
            ModuleNotFoundError: four bits need bitsandbytes.
        """
        self.encoder, self.config = encoder, config
        transformer = encoder.st[0]
        if isinstance(transformer.model, PeftModel):  # of an earlier tuning
            transformer.model = transformer.model.merge_and_unload()
            transformer.__class__ = Transformer  # and no longer LoraTransformer, whose name would be saved
        self.whole = _to_four_bits(transformer.model, dtype, device) if four_bits else {}
        transformer.model = get_peft_model(transformer.model.to(device), config)
        if not four_bits:
            _cast_frozen(transformer.model, dtype)

    def finish(self, merge: bool) -> None:
        """Leave the LLM with LoRA's changes added to its weights, in float32, or beside them."""
        transformer = self.encoder.st[0]
        model = transformer.model
        if self.whole:
            state = {name: p.cpu() for name, p in get_peft_model_state_dict(model).items()}
            llm = model.unload().to("cpu")
            for name, linear in self.whole.items():
                llm.set_submodule(name, linear)
            llm.is_loaded_in_4bit = False
            model = get_peft_model(llm, self.config)
            set_peft_model_state_dict(model, state)
        _cast_frozen(model, torch.float32)  # before LoRA's small changes are added
        transformer.model = model.merge_and_unload() if merge else model


def _cast_frozen(llm: nn.Module, dtype: torch.dtype) -> None:
    """The weights of linear layers that are not trained; norms and embeddings stay, since all that follows adds to
    what they give."""
    for module in llm.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(dtype)


def _to_four_bits(llm: Any, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Replace the linear layers by quantised ones on `device`; what they were, on the CPU."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("--tune.quantize needs the package bitsandbytes: pip install 'llm2clip[qlora]'")
    from bitsandbytes.nn import Linear4bit, Params4bit

    whole = {name: module.to("cpu") for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in whole.items():
        bias = linear.bias is not None
        small = Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=dtype, quant_type="nf4")
        small.weight = Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        if bias:
            small.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
        llm.set_submodule(name, small.to(device))
    llm.is_loaded_in_4bit = True  # what peft asks
    return whole


# ---- a folder of its own --------------------------------------------------------------------------------------------


class LoraTransformer(Transformer):
    """sentence-transformers' module for a folder of `complete`: LoRA beside its LLM, as it was tuned."""

    model: Any

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.model = PeftModel.from_pretrained(self.model, model_name_or_path)

    @staticmethod
    def _load_config(model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return AutoConfig.from_pretrained(model_name_or_path, **config_kwargs), False

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        base = PeftConfig.from_pretrained(model_name_or_path).base_model_name_or_path
        try:
            return super()._load_model(base, *args, **kwargs)
        except OSError as error:
            raise OSError(
                f"{model_name_or_path} holds LoRA for {base}, which could not be opened: {error}\n"
                f"Write where that LLM is now into its {ADAPTER}, as base_model_name_or_path"
            ) from error


def is_lora(folder: str | Path) -> bool:
    """Whether a folder holds LoRA apart from its LLM."""
    return (Path(folder) / ADAPTER).is_file()


def complete(folder: str | Path, llm: Any) -> None:
    """Add to a folder that sentence-transformers wrote of an encoder what it needs to open as the same one.

    Args:
        folder: it.
        llm: the encoder's PeftModel.
    """
    llm.get_base_model().config.save_pretrained(folder)
    adapter, modules = Path(folder) / ADAPTER, Path(folder) / "modules.json"
    config, listed = json.loads(adapter.read_text()), json.loads(modules.read_text())
    if Path(config["base_model_name_or_path"]).is_dir():
        config["base_model_name_or_path"] = str(Path(config["base_model_name_or_path"]).resolve())
    listed[0]["type"] = f"{LoraTransformer.__module__}.{LoraTransformer.__name__}"
    adapter.write_text(json.dumps(config, indent=1))
    modules.write_text(json.dumps(listed, indent=1))


def open_lora(folder: str | Path, device: str | None) -> SentenceTransformer:
    """The encoder of such a folder, its LLM in float32.

    Raises:
        OSError: its LLM is not there.
        ValueError: the folder asks for code from elsewhere.
    """
    listed = json.loads((Path(folder) / "modules.json").read_text())
    no_code: dict[str, Any] = {"trust_remote_code": False}
    modules: list[nn.Module] = [
        LoraTransformer.load(str(folder), model_kwargs={"dtype": torch.float32, **no_code}, **no_code)
    ]
    for module in listed[1:]:
        if not module["type"].startswith("sentence_transformers."):
            raise ValueError(f"{folder}/modules.json: {module['type']} is not a part of sentence-transformers")
        kind: Any = import_from_string(module["type"])
        modules.append(kind.load(str(folder), subfolder=module["path"]))
    settings = json.loads((Path(folder) / "config_sentence_transformers.json").read_text())
    return SentenceTransformer(
        modules=modules,
        device=device,
        prompts=settings.get("prompts"),
        default_prompt_name=settings.get("default_prompt_name"),
    )
