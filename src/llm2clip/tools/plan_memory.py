"""Accelerator specifications, assumed model FLOPs utilisation, and memory estimates for each stage.

A trained fp32 weight takes 4 bytes, its gradient 4 bytes, and AdamW's two moments 8 bytes. With several processes,
DistributedDataParallel keeps a second copy of the gradients in its communication buckets. The backward pass frees
activations as it creates gradients. If a step has a single pass, only the larger of activations and gradients counts.
With gradient caching, gradients of earlier passes are in memory at the same time as activations of the current pass.

On a CPU, memory use can also peak before training, while the LLM is loaded. The component `loading` is the size of the
fp32 weights plus the size of the memory-mapped 16-bit files from which the weights are converted.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from llm2clip.config import AlignConfig, Stage, TuneConfig

# `llm2clip --help` imports this module. Importing `plan_costs` at run time would make the command slow.
if TYPE_CHECKING:
    from llm2clip.tools.plan_costs import ImageCosts, TextCosts

# Model FLOPs utilisation of each stage on a GPU, from `benchmarks/roofline.py` (see docs/results/speed.md).
# Vision towers have smaller matrices than LLMs and spend half their time on elementwise operations.
MFU = {"tune": 0.4, "embed": 0.4, "align": 0.25}

FRAMEWORK_OVERHEAD = 1e9  # bytes per device for the CUDA context and PyTorch's libraries
CPU_FRAMEWORK_OVERHEAD = 0.75e9  # bytes per process for PyTorch, transformers and the interpreter
USABLE_FRACTION = 0.93  # fraction of device memory that is not lost to fragmentation
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # per weight: 4 bits, an 8-bit scale per 64 weights, a 32-bit scale per 256 scales
MIN_EMBED_TOKENS = 8192  # smallest batch that `embed` tries on GPUs, in tokens

Parts = dict[str, float]  # component name -> bytes


@dataclass(frozen=True)
class Device:
    """Accelerator specifications. Throughputs are for dense matmuls, in 10^12 FLOP/s."""

    name: str  # value of --device
    half: float  # throughput in bf16 with fp32 accumulation, or in fp16 if `bf16` is False
    full: float  # throughput in fp32 without TF32 tensor cores, which PyTorch does not use by default
    memory: float  # in GB (10^9 bytes). An 80 GB device has 80 * 2^30 bytes; the driver uses the extra 7%
    bf16: bool = True  # True if the hardware supports bf16 matmuls

    def resolve_precision(self, setting: str, stage: Stage = "tune") -> str:
        """Resolve a stage's precision setting to fp32, bf16 or fp16. `bf16+N` and calibrated precisions become bf16.

        Raises:
            ValueError: bf16 was requested, but the hardware does not support it.
        """
        if setting == "auto":
            from llm2clip.models.precision import choose_auto_precision

            device_type = "cpu" if self.name.lower() == "cpu" else "cuda"
            return "fp32" if choose_auto_precision(stage, device_type, self.bf16) == "fp32" else "bf16"
        if setting.startswith("bf16") and not self.bf16:
            raise ValueError(f"{self.name} does not support bf16. Use fp16, fp32 or auto")
        return setting.partition("+")[0]

    def get_peak_flops(self, setting: str) -> float:
        return 1e12 * (self.full if self.resolve_precision(setting) == "fp32" else self.half)


# Sources: NVIDIA's data sheets and, for the RTX 4090, appendix A of the Ada GPU architecture white paper.
# For the H100, H200 and L4, the data sheets list the throughput with sparsity, which is twice the dense throughput.
_DEVICES = (
    Device("h100", 989.5, 67, 80),
    Device("h200", 989.5, 67, 141),
    Device("a100-80", 312, 19.5, 80),
    Device("a100-40", 312, 19.5, 40),
    Device("l40s", 362, 91.6, 48),
    Device("rtx4090", 165.2, 82.6, 24),
    Device("l4", 121, 30.3, 24),
    Device("t4", 65, 8.1, 16, bf16=False),
)
DEVICES = {device.name: device for device in _DEVICES}


@cache
def _measure_cpu_specs() -> tuple[float, float]:
    """Return this machine's fp32 matmul throughput in TFLOP/s and its free memory in GB."""
    import torch

    from llm2clip.cpu_tuning import get_available_memory

    matrix = torch.ones(1024, 1024)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        durations.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(durations) / 1e12, round(get_available_memory() / 1e9, 1)


@dataclass
class Machine:
    """Number and type of devices in a plan."""

    device: str
    """h100, h200, a100-80, a100-40, l40s, rtx4090, l4, t4 or cpu. For cpu, the throughput and free memory of this
    machine are measured. For any other device, set --tflops and --memory."""
    count: int = 1
    """Number of devices, with one process per device."""
    mfu: float | None = None
    """Model FLOPs utilisation (MFU), as a fraction. Default: 0.25 for align, 0.4 for tune and embed."""
    tflops: float | None = None
    """Peak throughput per device at the configured precision, in 10^12 FLOP/s. Default: from the data sheet."""
    memory: float | None = None
    """Memory per device in GB. Default: from the data sheet."""
    use_fsdp: bool = False
    """Shard the weights across the devices (FSDP2)."""

    def __post_init__(self) -> None:
        for name in ("count", "mfu", "tflops", "memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be greater than 0 (got {value})")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"--mfu must be at most 1 (got {self.mfu})")
        is_unknown = self.device.lower() not in DEVICES and not self.is_cpu
        if is_unknown and (self.tflops is None or self.memory is None):
            raise ValueError(
                f"--device must be one of {', '.join(DEVICES)} or cpu (got {self.device}). For any other device, set "
                "--tflops (10^12 FLOP/s) and --memory (GB)"
            )

    @property
    def is_cpu(self) -> bool:
        return self.device.lower() == "cpu"

    @property
    def num_shards(self) -> int:
        return self.count if self.use_fsdp else 1

    @property
    def device_spec(self) -> Device:
        """Specifications of one device. --tflops and --memory override the values in `DEVICES`."""
        device = DEVICES.get(self.device.lower()) or Device(self.device, 0, 0, 0)
        if self.is_cpu:
            import torch

            from llm2clip.models.precision import has_native_bf16

            tflops, memory = _measure_cpu_specs() if None in (self.tflops, self.memory) else (0.0, 0.0)
            device = Device("cpu", tflops, tflops, memory, bf16=has_native_bf16(torch.device("cpu")))
        if self.tflops is not None:
            device = dataclasses.replace(device, half=self.tflops, full=self.tflops)
        return device if self.memory is None else dataclasses.replace(device, memory=self.memory)

    def get_model_flops_utilization(self, stage: str) -> float:
        return self.mfu or MFU[stage]

    def estimate_hours(self, flops: float, precision: str, stage: str) -> float:
        """Return the duration of a stage in hours. `flops` is the total over all devices."""
        peak_flops = self.device_spec.get_peak_flops(precision)
        return flops / (self.count * self.get_model_flops_utilization(stage) * peak_flops) / 3600


# ---- memory ----------------------------------------------------------------------------------------------------------


def estimate_tune_memory(text: "TextCosts", config: TuneConfig, machine: Machine) -> Parts:
    """Estimate the bytes of each component in the `tune` stage. `config.precision` must be fp32, bf16 or fp16."""
    from llm2clip.models.text.packing import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS

    value_bytes, num_shards = get_bytes_per_value(config.precision), machine.num_shards
    tokens_per_step = 2 * config.batch_size * text.tokens  # two texts per pair
    tokens_per_pass = tokens_per_step
    if config.grad_cache:
        default = CPU_BATCH_TOKENS if machine.is_cpu else GPU_BATCH_TOKENS
        tokens_per_pass = min(tokens_per_step, config.batch_tokens or default)

    parts: Parts = {}
    if config.lora_r:
        linear_bytes = NF4_BYTES if config.qlora else value_bytes
        parts["LLM"] = (linear_bytes * text.linear + 4 * (text.parameters - text.linear)) / num_shards
        parts["LoRA"] = 4 * text.trained / num_shards
    else:
        parts["LLM"] = 4 * text.parameters / num_shards
        if value_bytes == 2:
            parts["half-precision copies"] = 2 * (text.largest_linear if machine.use_fsdp else text.linear)
    if machine.use_fsdp:
        parts["gathered"] = 2 * value_bytes * text.largest_linear  # weights of the current layer and the next layer
    parts |= estimate_optimizer_memory(text.trained, machine)
    saved = tokens_per_pass * count_activation_bytes(text, config.gradient_checkpointing)
    parts["activations"] = _subtract_gradient_bytes(saved, text.trained / num_shards, tokens_per_pass < tokens_per_step)
    return parts | _estimate_memory_overhead(text, machine)


def estimate_embed_memory(text: "TextCosts", precision: str, machine: Machine) -> Parts:
    """Estimate the bytes of each component in the `embed` stage.

    On GPUs, the estimate is for the smallest batch, because `embed` uses larger batches only if they fit in memory. The
    LLM is loaded on the CPU, and its linear weights are stored on the device only in the matmul precision.
    """
    from llm2clip.models.text.packing import CPU_BATCH_TOKENS

    parts = {"LLM": get_bytes_per_value(precision) * text.linear + 4.0 * (text.parameters - text.linear)}
    parts["activations"] = (CPU_BATCH_TOKENS if machine.is_cpu else MIN_EMBED_TOKENS) * text.saved_per_token
    return parts | _estimate_memory_overhead(text, machine)


def estimate_align_memory(image: "ImageCosts", text: "TextCosts", config: AlignConfig, machine: Machine) -> Parts:
    """Estimate the bytes of each component in the `align` stage. `config.precision` must be fp32, bf16 or fp16.

    On a CPU, the component `loading` is included, because `align` loads the LLM to check the store's encoder.
    """
    from llm2clip.train.losses import LOGITS_PER_CHUNK, get_loss

    micro_batch = min(config.micro_batch_size or config.batch_size, config.batch_size)
    images = config.batch_size * machine.count
    texts = images * image.captions

    parts = {"model": 4 * image.parameters / machine.num_shards} | estimate_optimizer_memory(image.trained, machine)
    if config.precision != "fp32":
        parts["half-precision copies"] = image.copies / machine.num_shards
    # Add `saved_per_layer` for the activation gradients of one layer.
    activations = micro_batch * (image.saved + image.saved_per_layer)
    several_passes = micro_batch < config.batch_size
    parts["activations"] = _subtract_gradient_bytes(activations, image.trained / machine.num_shards, several_passes)
    # Memory of the embeddings, the gathered embeddings, their gradients, and the tensors for one chunk of logits.
    chunk = min(LOGITS_PER_CHUNK["cpu" if machine.is_cpu else "cuda"], config.batch_size * texts)
    dims = image.embed_dim + sum(config.matryoshka_dims)
    parts["loss"] = 12 * dims * (images + texts) + 4 * chunk * get_loss(config.loss).chunk_tensors
    if config.distill_weight:
        # Trained and pretrained tower: distances from this rank's features to all features, intermediates, gradients.
        parts["loss"] += 24 * config.batch_size * images
        parts["pretrained tower"] = 4.0 * image.tower
    return parts | _estimate_memory_overhead(text, machine)


def count_activation_bytes(text: "TextCosts", gradient_checkpointing: bool) -> float:
    """Return the bytes per token of all saved activations and one layer's activation gradients."""
    saved = text.layers * text.saved_per_token
    if gradient_checkpointing:
        saved = text.layers * 4 * text.hidden_size + text.saved_per_token
    return saved + text.saved_per_token


def estimate_optimizer_memory(trained: float, machine: Machine) -> Parts:
    """Return the bytes per device of the gradients and AdamW moments, given the number of trained weights."""
    if machine.use_fsdp:
        return {"gradients": 4 * trained / machine.count, "AdamW": 8 * trained / machine.count}
    return {"gradients": 4 * trained * (2 if machine.count > 1 else 1), "AdamW": 8 * trained}


def get_bytes_per_value(precision: str) -> int:
    return 4 if precision == "fp32" else 2


def compute_peak_memory(parts: Parts) -> float:
    """Return the peak memory in bytes, reached during training or while the LLM is loaded."""
    training = sum(size for part, size in parts.items() if part != "loading")
    return max(training, parts.get("loading", 0.0))


def fits_in_memory(parts: Parts, memory: float) -> bool:
    return compute_peak_memory(parts) <= USABLE_FRACTION * memory * 1e9


def _subtract_gradient_bytes(activations: float, trained: float, several_passes: bool) -> float:
    return activations if several_passes else max(0.0, activations - 4 * trained)


def _estimate_memory_overhead(text: "TextCosts", machine: Machine) -> Parts:
    if not machine.is_cpu:
        return {"libraries": FRAMEWORK_OVERHEAD}
    # While weights are converted, memory contains fp32 weights (4 bytes) and memory-mapped 16-bit weights (2 bytes).
    return {"libraries": CPU_FRAMEWORK_OVERHEAD, "loading": 6.0 * text.parameters + CPU_FRAMEWORK_OVERHEAD}
