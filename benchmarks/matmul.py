"""Measure the speed (GFLOP/s) and error of matmuls on this CPU with MKL in float32 and oneDNN in float32 and bfloat16.

    python benchmarks/matmul.py [--tokens 1024]

The matrix shapes are those of SmolLM2-135M's layers. The variants alternate, and the fastest of 20 runs is reported.
The error is relative to float64. On some CPUs (with AMX), oneDNN computes float32 matmuls in bfloat16 if reduced
precision is allowed, as it is here. A large error reveals this. On such CPUs, `llm2clip.cpu_tuning.onednn_matmul` does
not use oneDNN.
"""

import argparse
import time

import torch
import torch.nn.functional as F

SHAPES = ((576, 1536), (1536, 576), (576, 576))  # (input features, output features)
PRECISIONS = {"MKL, fp32": "highest", "oneDNN, fp32": "medium", "oneDNN, bf16": "highest"}
RUNS = 20


def measure(tokens: int, inputs: int, outputs: int) -> dict[str, tuple[float, float]]:
    """Return the speed in GFLOP/s and the relative error of each variant."""
    x, weight = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    exact = F.linear(x.double(), weight.double())
    seconds: dict[str, list[float]] = {variant: [] for variant in PRECISIONS}
    errors: dict[str, float] = {}
    operands = dict.fromkeys(PRECISIONS, (x, weight))
    operands["oneDNN, bf16"] = (x.bfloat16(), weight.bfloat16())
    for _ in range(RUNS):
        for variant, precision in PRECISIONS.items():
            torch.set_float32_matmul_precision(precision)
            start = time.perf_counter()
            result = F.linear(*operands[variant])
            seconds[variant].append(time.perf_counter() - start)
            errors[variant] = float((result - exact).norm() / exact.norm())
    gflop = 2e-9 * tokens * inputs * outputs
    return {variant: (gflop / min(seconds[variant]), errors[variant]) for variant in PRECISIONS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="number of rows in the input matrix")
    tokens = parser.parse_args().tokens
    print(f"| matmul | {' | error | '.join(PRECISIONS)} | error |")
    print("|" + " --- |" * (1 + 2 * len(PRECISIONS)))
    for inputs, outputs in SHAPES:
        results = measure(tokens, inputs, outputs)
        cells = [f"{speed:.0f} | {error:.0e}" for speed, error in results.values()]
        print(f"| {tokens} x {inputs} x {outputs} | {' | '.join(cells)} |")
