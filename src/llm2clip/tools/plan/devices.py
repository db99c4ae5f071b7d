"""What a device can do at best, as its maker says: products per second and memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: as the command knows it.
        half: dense 10^12 FLOP/s of products in bf16, accumulated in fp32; in fp16 where `bf16` is false.
        full: the same in fp32, outside of tensor cores, as PyTorch multiplies fp32 unless told otherwise.
        memory: GB (10^9 bytes); makers mean 2^30, which leaves 7% for what the driver keeps.
        bf16: it multiplies bf16 in hardware.
    """

    name: str
    half: float
    full: float
    memory: float
    bf16: bool = True

    def precision(self, asked: str) -> str:
        """fp32, bf16 or fp16: auto is bf16 where the hardware has it, bf16+N counts as bf16.

        Raises:
            ValueError: bf16 is asked of hardware that has none.
        """
        if asked == "auto":
            return "bf16" if self.bf16 else "fp32"
        if asked.startswith("bf16") and not self.bf16:
            raise ValueError(f"{self.name} has no bf16: plan with fp16, fp32 or auto")
        return asked.partition("+")[0]

    def rate(self, precision: str) -> float:
        """FLOP/s in a precision as of `precision`."""
        return 1e12 * (self.full if self.precision(precision) == "fp32" else self.half)


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA H100 and H200 data sheets, SXM: bf16 1,979 "with sparsity", which is twice the dense figure.
        Device("h100", 989.5, 67, 80),
        Device("h200", 989.5, 67, 141),
        # NVIDIA A100 data sheet.
        Device("a100-80", 312, 19.5, 80),
        Device("a100-40", 312, 19.5, 40),
        # NVIDIA L40S data sheet: 362.05 dense.
        Device("l40s", 362, 91.6, 48),
        # NVIDIA Ada GPU architecture white paper, appendix A: 165.2 dense with fp32 accumulation.
        Device("rtx4090", 165.2, 82.6, 24),
        # NVIDIA L4 data sheet: 242 with sparsity.
        Device("l4", 121, 30.3, 24),
        # NVIDIA T4 data sheet: fp16; it has no bf16.
        Device("t4", 65, 8.1, 16, bf16=False),
    )
}


@dataclass
class Machine:
    """What a plan is for.

    Args:
        device: h100, h200, a100-80, a100-40, l40s, rtx4090, l4, t4; or any name, with its numbers.
        count: devices, in as many processes.
        mfu: share of the device's products per second that training reaches; assumed.
        tflops: 10^12 FLOP/s of the device in the recipe's precision, if it is not known or not as said.
        memory: GB of the device, likewise.
        use_fsdp: weights are shared out over the devices (FSDP2).
    """

    device: str
    count: int = 1
    mfu: float = 0.4
    tflops: float | None = None
    memory: float | None = None
    use_fsdp: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for a device that is neither known nor described, and for numbers that make no sense."""
        for name in ("count", "mfu", "tflops", "memory"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"--{name} is more than 0; got {value}")
        if self.mfu > 1:
            raise ValueError(f"--mfu is a share of the device's products, at most 1; got {self.mfu}")
        if self.device.lower() not in DEVICES and (self.tflops is None or self.memory is None):
            raise ValueError(
                f"--device {self.device} is not one of {', '.join(DEVICES)}: give what it does with --tflops (10^12 "
                "products and sums a second in the recipe's precision) and --memory (GB)"
            )

    @property
    def each(self) -> Device:
        """One of its devices, by the table and by what was said in its place."""
        known = DEVICES.get(self.device.lower()) or Device(self.device, 0, 0, 0)
        if self.tflops is not None:
            known = dataclasses.replace(known, half=self.tflops, full=self.tflops)
        return dataclasses.replace(known, memory=self.memory) if self.memory is not None else known

    def hours(self, flop: float, precision: str) -> float:
        """How long so many FLOP take."""
        return flop / (self.count * self.mfu * self.each.rate(precision)) / 3600
