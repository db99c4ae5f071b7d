"""Memory at the true sizes of Llama-3-8B and ViT-L/14-336, measured with fake tensors, and compared with plans."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import make_llm
from llm2clip.config import AlignConfig, EncoderConfig, TuneConfig
from llm2clip.cpu_tuning import is_onednn_faster
from llm2clip.models.precision import Precision, cast_linear_weights
from llm2clip.models.text import packing
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import PACKED, TokenizedTexts, get_default_encoding_batch_tokens
from llm2clip.models.text.sentence_transformer import cast_frozen_linear_layers
from llm2clip.tools.plan_costs import (
    TextCosts,
    build_align_model,
    build_llm_on_meta_device,
    get_llm_config,
)
from llm2clip.tools.plan_memory import (
    USABLE_FRACTION,
    Machine,
    compute_peak_memory,
    estimate_align_memory,
    estimate_embed_memory,
    estimate_tune_memory,
    fits_in_memory,
)
from llm2clip.train.optim import compute_cached_loss, make_optimizer, select_trainable_weights
from llm2clip.train.tune import PairLoss
from test_plan import measure_image_costs, measure_text_costs

LLAMA_8B = EncoderConfig("meta-llama/meta-llama-3-8b")
ALIGN = AlignConfig(
    tower="openai/clip-vit-large-patch14-336", adapter_depth=4, embed_dim=1280, captions_per_image=1, precision="bf16"
)
GPU_GB = 24
GPU = Machine("rtx4090")
LIMIT = USABLE_FRACTION * GPU_GB * 1e9 - 1e9  # bytes for tensors: without fragmentation and PyTorch's libraries
CAPTION_TOKENS = 84


@pytest.fixture(autouse=True)
def fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use fused attention, as on GPUs."""
    monkeypatch.setattr(packing, "MAX_UNFUSED_LENGTH", 0)
    is_onednn_faster()  # compares values, which fake tensors do not have; the result is cached


class PeakMemory(TorchDispatchMode):
    """Records the peak size of all live tensors, in bytes: the weights of `modules`, and everything allocated since."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}  # address of a storage -> size
        self.live = self.peak = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._add(value)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def fake_tensors(*models: nn.Module) -> Iterator[None]:
    """Run the `with` block on fake CPU tensors, to which the weights of `models` on the meta device are converted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            model.to_empty(device="cpu")
        yield


def count_bytes(*modules: nn.Module) -> int:
    """Return the size of all weights and buffers, in bytes."""
    return PeakMemory(*modules).peak


class MeanPooling(nn.Module):
    """Mean pooling that needs no values of tensors, unlike the pooling of sentence-transformers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens = features["token_embeddings"][0].split(features["caption_lengths"])
        features["sentence_embedding"] = torch.stack([caption.mean(0) for caption in tokens])
        return features

    def get_embedding_dimension(self) -> int:
        return self.dim


@pytest.fixture(scope="module")
def build_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CaptionEncoder]:
    """Return a function that builds an encoder with Llama-3-8B, on the meta device and without its layers' values."""
    tiny = CaptionEncoder.from_pretrained(make_llm(tmp_path_factory.mktemp("llm")), device="cpu")

    def build(layers: int | None = None) -> CaptionEncoder:
        config = get_llm_config(dataclasses.replace(LLAMA_8B, layers=layers))
        config.is_causal = False
        encoder = copy.deepcopy(tiny)
        encoder.st[0].model = build_llm_on_meta_device(config)
        encoder.st[1] = MeanPooling(config.hidden_size)
        encoder.llm.set_attn_implementation(PACKED)
        return encoder

    return build


def fill_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state, which the first step does otherwise."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def planned_costs(config: TuneConfig, layers: int | None = None) -> TextCosts:
    return measure_text_costs(dataclasses.replace(LLAMA_8B, layers=layers), config, CAPTION_TOKENS)


def plan_align(config: AlignConfig) -> dict[str, float]:
    """Return the planned memory per component of `align` with embeddings from Llama-3-8B."""
    text = planned_costs(TuneConfig(precision="bf16"))
    return estimate_align_memory(measure_image_costs(config, text.embed_dim, 1), text, config, GPU)


def captions(tokens: int) -> TokenizedTexts:
    count = tokens // CAPTION_TOKENS
    return TokenizedTexts([[1] * CAPTION_TOKENS] * count, [], [0] * count)


# ---- encoding --------------------------------------------------------------------------------------------------------


def encoding_peak(encoder: CaptionEncoder, tokens: int) -> float:
    """Return the peak memory in bytes of encoding a batch of captions in bf16, including the weights."""
    cast_linear_weights(encoder.llm, Precision("bf16"))
    encoder.weights_precision = Precision("bf16")
    with fake_tensors(encoder), PeakMemory(encoder) as memory:
        encoder.encode(captions(tokens), batch_tokens=tokens)
    return memory.peak


def test_embed_with_an_8b_llm_fits_and_matches_the_plan(build_encoder: Callable[..., CaptionEncoder]) -> None:
    peak = encoding_peak(build_encoder(), 8192)
    assert peak < LIMIT
    parts = estimate_embed_memory(planned_costs(TuneConfig(precision="bf16")), "bf16", GPU)
    assert compute_peak_memory(parts) - parts["libraries"] == pytest.approx(peak, rel=0.05)


def test_search_and_evaluate_with_an_8b_llm_fit(build_encoder: Callable[..., CaptionEncoder]) -> None:
    """The vision tower, its heads and the LLM are in memory together, and each encodes its default batch."""
    encoder = build_encoder()
    tokens = get_default_encoding_batch_tokens(torch.device("cuda"), 4096)
    text_peak = encoding_peak(encoder, tokens)
    llm_bytes = count_bytes(encoder)
    model = build_align_model(ALIGN, 4096).eval()
    size = model.tower.preprocess.size
    with fake_tensors(model), PeakMemory(model) as memory, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(pixels=torch.zeros(64, 3, size, size, dtype=torch.uint8))
    assert 16e9 < llm_bytes < 17e9
    assert count_bytes(model) + text_peak < LIMIT
    assert llm_bytes + memory.peak < LIMIT


# ---- align -----------------------------------------------------------------------------------------------------------


def align_peak(config: AlignConfig) -> float:
    """Return the peak memory in bytes of a training step after the first. The loss is an ordinary contrastive loss."""
    model = build_align_model(config, 4096)
    with torch.device("meta"):
        select_trainable_weights(model, config)
    size, count = model.tower.preprocess.size, config.batch_size
    part = config.micro_batch_size or count

    def loss_function(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale.mean() * image @ text.T, torch.arange(count))

    with fake_tensors(model), PeakMemory(model) as memory:
        optimizer = make_optimizer(model, config, torch.device("cpu"))
        pixels, texts = torch.zeros(count, 3, size, size, dtype=torch.uint8), torch.zeros(count, 4096)

        def forward(start: int) -> tuple[Tensor, ...]:
            with torch.autocast("cpu", torch.bfloat16):
                image, text, scale, _ = model(pixels[start : start + part], texts[start : start + part])
            return image, text, scale[None]

        passes = [partial(forward, start) for start in range(0, count, part)]
        fill_optimizer_state(optimizer)
        if len(passes) == 1:
            loss = loss_function(*passes[0]())
        else:
            loss = compute_cached_loss(passes, loss_function, model, torch.device("cpu"))
        loss.backward()
        optimizer.step()
    return memory.peak


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8},
        {"batch_size": 4, "micro_batch_size": 2, "tower": "openai/clip-vit-base-patch16"},
    ],
    ids=["one pass", "gradient caching"],
)
def test_align_memory_matches_the_plan(settings: dict[str, Any]) -> None:
    config = dataclasses.replace(ALIGN, **settings)
    parts = plan_align(config)
    assert compute_peak_memory(parts) - parts["libraries"] == pytest.approx(align_peak(config), rel=0.08)


def test_align_fits_with_the_published_batch_size() -> None:
    """The published batch of 512 images per GPU, in micro-batches of 16."""
    config = dataclasses.replace(ALIGN, batch_size=512, micro_batch_size=16)
    assert fits_in_memory(plan_align(config), GPU_GB)


# ---- tune ------------------------------------------------------------------------------------------------------------


def tune_peak(encoder: CaptionEncoder, config: TuneConfig) -> float:
    """Return the peak memory in bytes of a training step after the first, with LoRA and frozen weights in bf16."""
    encoder.llm.get_input_embeddings().requires_grad_(False)
    with torch.device("meta"):
        encoder.st[0].model = get_peft_model(encoder.llm, LoraConfig(r=config.lora_r, target_modules="all-linear"))
    cast_frozen_linear_layers(encoder.llm, torch.bfloat16)
    if config.gradient_checkpointing:
        encoder.llm.gradient_checkpointing_enable({"use_reentrant": False})
        encoder.llm.enable_input_require_grads()
    count = 2 * config.batch_size
    batch = {"tokens": [[1] * CAPTION_TOKENS] * count, "prompt_lengths": [0] * count, "pairs": config.batch_size}
    with fake_tensors(encoder), PeakMemory(encoder) as memory:
        encoder.st.train().forward = torch.autocast("cpu", torch.bfloat16)(encoder.st.forward)
        optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], foreach=False)
        loss_function = PairLoss(encoder, 0.05, config.batch_tokens or 32768, grad_cache=config.grad_cache)
        fill_optimizer_state(optimizer)
        loss_function([{**batch, "text_ids": torch.zeros(count, dtype=torch.long)}]).backward()
        optimizer.step()
    return memory.peak


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True}, {"grad_cache": True, "batch_tokens": 840}],
    ids=["one pass", "gradient checkpointing", "gradient caching"],
)
def test_tune_memory_matches_the_plan(build_encoder: Callable[..., CaptionEncoder], settings: dict[str, Any]) -> None:
    """With four layers. All layers are equal, so the plan for all layers is as accurate."""
    config = TuneConfig(batch_size=10, precision="bf16", **settings)
    parts = estimate_tune_memory(planned_costs(config, layers=4), config, GPU)
    peak = tune_peak(build_encoder(layers=4), config)
    assert compute_peak_memory(parts) - parts["libraries"] == pytest.approx(peak, rel=0.05)


def test_qlora_with_an_8b_llm_fits() -> None:
    """The default batch of 128 pairs, with the settings in docs/results/speed.md."""
    config = TuneConfig(qlora=True, gradient_checkpointing=True, grad_cache=True, batch_tokens=4096, precision="bf16")
    parts = estimate_tune_memory(planned_costs(config), config, GPU)
    assert fits_in_memory(parts, GPU_GB)
    assert 5e9 < parts["LLM"] < 6.5e9  # 7 billion weights in 4 bits, and token embeddings in fp32
