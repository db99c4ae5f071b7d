"""GFLOP/s of products on this CPU by MKL and by oneDNN, in the sizes of SmolLM2-135M's blocks, turn by turn; and how
far they are from those in float64. Some CPUs (AMX) multiply bf16 where oneDNN is asked for float32 that may be rounded:
such a rate is that of bf16, and `llm2clip.cpu_tuning.quick_products` leaves it alone.

python benchmarks/products.py [--tokens 1024]
"""

import argparse
import time

import torch
import torch.nn.functional as F

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    tokens = parser.parse_args().tokens
    print("| product | MKL, fp32 | error | oneDNN, fp32 | error | oneDNN, bf16 | error |\n|" + " --- |" * 7)
    for read, write in ((576, 1536), (1536, 576), (576, 576)):
        x, w = torch.randn(tokens, read), torch.randn(write, read)
        exact = F.linear(x.double(), w.double())
        ways = {"highest": (x, w), "medium": (x, w), "bf16": (x.bfloat16(), w.bfloat16())}
        times: dict[str, list[float]] = {name: [] for name in ways}
        errors: dict[str, float] = {}
        for _ in range(20):
            for name, (a, b) in ways.items():
                torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
                start = time.perf_counter()
                found = F.linear(a, b)
                times[name].append(time.perf_counter() - start)
                errors[name] = float((found - exact).norm() / exact.norm())
        cells = [f"{2e-9 * tokens * read * write / min(times[n]):.0f} | {errors[n]:.0e}" for n in ways]
        print(f"| {tokens} x {read} x {write} | " + " | ".join(cells) + " |")
