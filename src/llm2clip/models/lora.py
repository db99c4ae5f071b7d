"""LoRA on a caption encoder's LLM: while it trains, with the LLM in 16 or 4 bits, and as a folder of its own.

QLoRA (arXiv 2305.14314) holds the matrices that LoRA leaves alone in 4 bits. They are rounded for the training only:
what LoRA's changes are added to is the LLM as it was. In 16 bits they stay rounded, which is nothing to an LLM that was
published so.

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

from llm2clip.models.pretrained import cache_dir

ADAPTER = "adapter_config.json"


class LoraSession:
    """An LLM with LoRA on it, from here to `finish`."""

    def __init__(self, encoder: Any, config: LoraConfig, dtype: torch.dtype, device: torch.device, four_bits: bool):
        """Put LoRA on an LLM that has none.

        Args:
            encoder: a caption encoder; changed in place.
            config: of LoRA.
            dtype: of the matrices that are not trained, or of the products with them.
            device: that of the training.
            four_bits: hold those matrices in 4 bits, which needs bitsandbytes; the whole ones wait on the CPU, where
                the LLM may be until now.
        """
        self.encoder, self.config = encoder, config
        transformer = encoder.st[0]
        self.whole = _to_four_bits(transformer.model, dtype, device) if four_bits else {}
        transformer.model = get_peft_model(transformer.model.to(device), config)
        if not four_bits:
            cast_frozen(transformer.model, dtype)

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
        cast_frozen(model, torch.float32)  # before LoRA's small changes are added
        if merge:
            transformer.model = model.merge_and_unload()
        else:
            transformer.model, transformer.__class__ = model, LoraTransformer


def merge_adapter(encoder: Any) -> None:
    """Make an ordinary LLM of one that an earlier tuning left with LoRA beside it."""
    transformer = encoder.st[0]
    if isinstance(transformer.model, PeftModel):
        transformer.model, transformer.__class__ = transformer.model.merge_and_unload(), Transformer


def check_qlora_available() -> None:
    """Raises ModuleNotFoundError where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError("--tune.qlora needs the package bitsandbytes: pip install 'llm2clip[qlora]'")


def cast_frozen(llm: nn.Module, dtype: torch.dtype) -> None:
    """The weights of linear layers that are not trained; norms and embeddings stay, since all that follows adds to
    what they give."""
    for module in llm.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(dtype)


def _to_four_bits(llm: Any, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Replace the linear layers by quantised ones on `device`; what they were, on the CPU."""
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
    """sentence-transformers' module for LoRA beside its LLM: the folder keeps what the LLM was when it was tuned."""

    model: Any

    def __init__(self, model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self.model = PeftModel.from_pretrained(self.model, model_name_or_path)

    @staticmethod
    def _load_config(model_name_or_path: str, backend: str, config_kwargs: dict[str, Any]) -> tuple[Any, bool]:
        return AutoConfig.from_pretrained(model_name_or_path, **config_kwargs), False

    def _load_model(self, model_name_or_path: str, *args: Any, **kwargs: Any) -> Any:
        base = str(PeftConfig.from_pretrained(model_name_or_path).base_model_name_or_path)
        if (
            Path(base).is_absolute() and not Path(base).is_dir()
        ):  # of another machine: perhaps it is in this one's cache
            base = str(named) if (named := cache_dir() / Path(base).name).is_dir() else base
        try:
            return super()._load_model(base, *args, **kwargs)
        except OSError as error:
            raise OSError(
                f"{model_name_or_path} holds LoRA for {base}, which could not be opened: {error}\n"
                f"Write where that LLM is now into its {ADAPTER}, as base_model_name_or_path"
            ) from error

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        super().save(output_path, *args, **kwargs)
        self.model.get_base_model().config.save_pretrained(output_path)
        file = Path(output_path) / ADAPTER
        config = json.loads(file.read_text())
        if Path(config["base_model_name_or_path"]).is_dir():
            config["base_model_name_or_path"] = str(Path(config["base_model_name_or_path"]).resolve())
            file.write_text(json.dumps(config, indent=1))


_NAME = f"{LoraTransformer.__module__}.{LoraTransformer.__name__}"


def is_lora_folder(folder: str | Path) -> bool:
    """Whether a folder holds LoRA apart from its LLM, as we write it.

    Raises:
        ValueError: it holds PEFT's files alone, which do not say how the LLM was read.
    """
    modules = Path(folder) / "modules.json"
    if (Path(folder) / ADAPTER).is_file() and not modules.is_file():
        raise ValueError(f"{folder} holds an adapter of PEFT alone; merge it into its LLM, and give the folder of that")
    return modules.is_file() and json.loads(modules.read_text())[0]["type"] == _NAME


def load_lora(folder: str | Path, device: str | None) -> SentenceTransformer:
    """The encoder of such a folder, its LLM in float32.

    Raises:
        OSError: its LLM is not there.
        ValueError: the folder asks for code from elsewhere.
    """
    listed = json.loads((Path(folder) / "modules.json").read_text())
    if not (Path(folder) / "adapter_model.safetensors").is_file():
        raise OSError(f"{folder} has no adapter_model.safetensors")
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
