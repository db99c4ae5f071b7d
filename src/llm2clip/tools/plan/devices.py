"""Accelerators' peak throughput and memory from data sheets, and the utilisation assumed for each stage."""

import dataclasses
from dataclasses import dataclass

from llm2clip.config import Stage

# Model FLOPs utilisation of each stage on a GPU, from `benchmarks/roofline.py` (see docs/results/speed.md). Vision
# towers have smaller matrices than LLMs and spend half their time on elementwise operations.
# Students of `distill` also have small matrices; their value is an assumption.
MFU = {"tune": 0.4, "embed": 0.4, "align": 0.25, "distill": 0.25}


@dataclass(frozen=True)
class Device:
    """Accelerator specifications. Throughputs are for dense matmuls, in 10^12 FLOP/s."""

    name: str  # value of --device
    half: float  # throughput in bf16 with fp32 accumulation, or in fp16 if `bf16` is False
    full: float  # throughput in fp32 without tensor cores, which is PyTorch's default
    memory: float  # GB (10^9 bytes). A device sold as 80 GB has 80 * 2^30 bytes; the extra 7% is left to the driver
    bf16: bool = True  # True if the hardware supports bf16 matmuls

    def resolve_precision(self, setting: str, stage: Stage = "tune") -> str:
        """Resolve a stage's precision setting to fp32, bf16 or fp16. `bf16+N` and calibrated precisions count as bf16.

        Raises:
            ValueError: The setting is bf16, but the hardware does not support bf16.
        """
        if setting == "auto":
            from llm2clip.models.precision import get_auto_precision

            device_type = "cpu" if self.name.lower() == "cpu" else "cuda"
            return "fp32" if get_auto_precision(stage, device_type, self.bf16) == "fp32" else "bf16"
        if setting.startswith("bf16") and not self.bf16:
            raise ValueError(f"{self.name} does not support bf16: use fp16, fp32 or auto")
        return setting.partition("+")[0]

    def get_peak_flops(self, setting: str) -> float:
        """Return the peak FLOP/s for a precision setting."""
        return 1e12 * (self.full if self.resolve_precision(setting) == "fp32" else self.half)


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA H100 and H200 (SXM) data sheets: bf16 at 1,979 TFLOP/s with sparsity, which is twice the dense rate.
        Device("h100", 989.5, 67, 80),
        Device("h200", 989.5, 67, 141),
        # NVIDIA A100 data sheet.
        Device("a100-80", 312, 19.5, 80),
        Device("a100-40", 312, 19.5, 40),
        # NVIDIA L40S data sheet: dense bf16 at 362.05 TFLOP/s.
        Device("l40s", 362, 91.6, 48),
        # NVIDIA Ada GPU architecture white paper, appendix A: dense bf16 with fp32 accumulation at 165.2 TFLOP/s.
        Device("rtx4090", 165.2, 82.6, 24),
        # NVIDIA L4 data sheet: bf16 at 242 TFLOP/s with sparsity, which is twice the dense rate.
        Device("l4", 121, 30.3, 24),
        # NVIDIA T4 data sheet: fp16 at 65 TFLOP/s. The T4 does not support bf16.
        Device("t4", 65, 8.1, 16, bf16=False),
    )
}


@dataclass
class Machine:
    """Number and type of devices in a plan."""

    device: str
    """h100, h200, a100-80, a100-40, l40s, rtx4090, l4 or t4. Any other name, including cpu (this machine's CPU), also
    requires --tflops and --memory."""
    count: int = 1
    """Number of devices. One process runs on each device."""
    mfu: float | None = None
    """Model FLOPs utilisation, as a fraction of peak throughput. Default: 0.25 for align and distill; 0.4 for tune,
    embed and llava."""
    tflops: float | None = None
    """Peak throughput per device at the configured precision, in 10^12 FLOP/s. Default: from the data sheet."""
    memory: float | None = None
    """Memory per device in GB. Default: from the data sheet."""
    use_fsdp: bool = False
    """Shard the weights across the devices (FSDP2)."""

    def __post_init__(self) -> None:
        """Raise ValueError if a value is out of range, or if --tflops or --memory is missing for an unknown device."""
        for name in ("count", "mfu", "tflops", "memory"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} must be greater than 0 (got {value})")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"--mfu must be at most 1 (got {self.mfu})")
        if self.device.lower() not in DEVICES and (self.tflops is None or self.memory is None):
            raise ValueError(
                f"--device must be one of {', '.join(DEVICES)} (got {self.device}); for any other device, set both "
                "--tflops (10^12 FLOP/s) and --memory (GB)"
            )

    @property
    def is_cpu(self) -> bool:
        return self.device.lower() == "cpu"

    @property
    def num_shards(self) -> int:
        """Number of devices across which each weight is sharded."""
        return self.count if self.use_fsdp else 1

    @property
    def device_spec(self) -> Device:
        """Specifications of one device. --tflops and --memory override the values in `DEVICES`."""
        device = DEVICES.get(self.device.lower()) or Device(
            self.device, 0, 0, 0, bf16=not self.is_cpu or _cpu_has_bf16()
        )
        if self.tflops is not None:
            device = dataclasses.replace(device, half=self.tflops, full=self.tflops)
        if self.memory is not None:
            device = dataclasses.replace(device, memory=self.memory)
        return device

    def get_mfu(self, stage: str) -> float:
        """Return the model FLOPs utilisation of `tune`, `embed`, `align` or `distill`."""
        return self.mfu or MFU[stage]

    def estimate_hours(self, flops: float, precision: str, stage: str) -> float:
        """Return the hours that a stage needs for `flops` FLOPs when all devices work in parallel."""
        return flops / (self.count * self.get_mfu(stage) * self.device_spec.get_peak_flops(precision)) / 3600


def _cpu_has_bf16() -> bool:
    import torch

    from llm2clip.models.precision import has_bf16_hardware

    return has_bf16_hardware(torch.device("cpu"))
