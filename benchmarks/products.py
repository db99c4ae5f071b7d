"""GFLOP/s of products on this CPU by MKL and by oneDNN, in the sizes of SmolLM2-135M's blocks, turn by turn.

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
    print("| product | MKL, fp32 | oneDNN, fp32 | oneDNN, bf16 |\n| --- | --- | --- | --- |")
    for read, write in ((576, 1536), (1536, 576), (576, 576)):
        x, w = torch.randn(tokens, read), torch.randn(write, read)
        ways = {"highest": (x, w), "medium": (x, w), "bf16": (x.bfloat16(), w.bfloat16())}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(20):
            for name, (a, b) in ways.items():
                torch.set_float32_matmul_precision("medium" if name == "medium" else "highest")
                start = time.perf_counter()
                F.linear(a, b)
                times[name].append(time.perf_counter() - start)
        rates = (2e-9 * tokens * read * write / min(t) for t in times.values())
        print(f"| {tokens} x {read} x {write} | " + " | ".join(f"{r:.0f}" for r in rates) + " |")
