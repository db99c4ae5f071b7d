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

    def rate(self, precision: str) -> float:
        """FLOP/s in fp32, bf16, bf16+N, fp16, or auto, which is bf16 where the hardware has it."""
        half = self.bf16 if precision == "auto" else precision != "fp32"
        return 1e12 * (self.half if half else self.full)


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


def find_device(name: str, tflops: float | None = None, memory: float | None = None) -> Device:
    """A device of the table, or any other by its numbers.

    Args:
        name: in `DEVICES`; another, such as cpu, needs both numbers.
        tflops: 10^12 FLOP/s, in place of the table's, whatever the precision.
        memory: GB, in place of the table's.

    Raises:
        ValueError: it is not in the table and a number is missing, or a number is not positive.
    """
    for option, value in (("tflops", tflops), ("memory", memory)):
        if value is not None and value <= 0:
            raise ValueError(f"--{option} is more than 0; got {value}")
    known = DEVICES.get(name.lower())
    if known is None and (tflops is None or memory is None):
        raise ValueError(
            f"--device {name} is not one of {', '.join(DEVICES)}: give what it does with --tflops (10^12 products and "
            "sums a second in the recipe's precision) and --memory (GB)"
        )
    known = known or Device(name, 0, 0, 0)
    if tflops is not None:
        known = dataclasses.replace(known, half=tflops, full=tflops)
    return dataclasses.replace(known, memory=memory) if memory is not None else known
