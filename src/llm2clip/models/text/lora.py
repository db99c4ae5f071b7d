"""LoRA training of a caption encoder's LLM. After training, the LoRA weights are merged into the LLM.

QLoRA (arXiv 2305.14314) stores the frozen matrices in 4 bits during training. Afterwards, LoRA is merged into the
original weights. Without QLoRA, the frozen matrices can be stored in 16 bits, and LoRA is then merged into the rounded
16-bit values. Rounding has no effect if the LLM was released in the same 16-bit format.
"""

from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from llm2clip.io_utils import install_command


class LoraSession:
    """LoRA training of an encoder's LLM. The constructor adds LoRA layers, and `finish` merges them into the LLM."""

    def __init__(self, encoder: Any, config: LoraConfig, dtype: torch.dtype, device: torch.device, quantize: bool):
        """Add LoRA to a `CaptionEncoder`'s LLM in place, and move the LLM to the training device.

        If the LLM is on the CPU at first, its float32 weights need not fit in the device's memory.

        Args:
            encoder: encoder whose LLM has no LoRA layers yet.
            dtype: dtype of the frozen matrices. If `quantize` is True, dtype of the matmuls with these matrices.
            quantize: if True, store the frozen matrices in 4 bits (QLoRA, requires bitsandbytes) and keep the original
                matrices on the CPU.
        """
        self.encoder, self.config = encoder, config
        transformer = encoder.st[0]
        self.original_layers = _quantize_linear_layers(transformer.model, dtype, device) if quantize else {}
        transformer.model = get_peft_model(transformer.model, config)
        if not quantize:
            cast_frozen_linear_layers(transformer.model, dtype)
        transformer.model.to(device)

    def finish(self) -> None:
        """Merge LoRA into the original weights in place, on the CPU and in float32.

        The CPU is used because the float32 weights may not fit in the device's memory.
        """
        transformer = self.encoder.st[0]
        model = transformer.model
        model = self._restore_original_layers(model) if self.original_layers else model.to("cpu")
        cast_frozen_linear_layers(model, torch.float32)  # in 16 bits, LoRA's small updates would be rounded away
        transformer.model = model.merge_and_unload()
        self.encoder.to("cpu")

    def _restore_original_layers(self, model: Any) -> Any:
        lora_weights = {name: weight.cpu() for name, weight in get_peft_model_state_dict(model).items()}
        llm = model.unload().to("cpu")
        for name, layer in self.original_layers.items():
            llm.set_submodule(name, layer)
        llm.is_loaded_in_4bit = False
        model = get_peft_model(llm, self.config)
        set_peft_model_state_dict(model, lora_weights)
        return model


def check_qlora_available() -> None:
    """Raise ModuleNotFoundError if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(f"--tune.qlora requires the bitsandbytes package: {install_command('qlora')}")


def cast_frozen_linear_layers(llm: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen linear layers to `dtype`.

    Norms and token embeddings keep their dtype, because their rounding errors would affect all later layers.
    """
    for module in llm.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.to(dtype)


def _quantize_linear_layers(llm: Any, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Linear]:
    """Replace linear layers with 4-bit layers on `device`. Return the original layers on the CPU, keyed by name."""
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
