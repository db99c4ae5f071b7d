"""Measure CPU training speed while another process uses the CPU, for several OpenMP settings.

    python benchmarks/busy_machine.py [--rounds 3] [--threads 2] [--tokens 1024] [--niceness 10] [--loops 1]

A step is a forward and a backward pass through 12 float32 transformer layers of SmolLM2-135M's shape. Each setting has
its own process, because OpenMP reads its settings when it is loaded. The processes take turns, one step at a time. All
rounds are first run alone, and then next to endless loops (by default, one loop with low priority). The table shows the
median time of a step. The script also checks that all settings with several threads give bit-identical results.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from hashlib import sha256

import torch
from transformers import LlamaConfig, LlamaModel

from llm2clip.cpu_tuning import keep_freed_memory

ONE_THREAD = "one thread"
SETTINGS: dict[str, dict[str, str]] = {
    "GOMP_SPINCOUNT=300000 (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=0 (llm2clip's default)": {"GOMP_SPINCOUNT": "0"},
    ONE_THREAD: {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"},
}


def run_steps(tokens: int) -> None:
    """Run a training step for every line on stdin. Print its time in seconds, and a hash of its loss and gradients."""
    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = LlamaModel(config)
    ids = torch.randint(1000, (tokens // 32, 32))
    for _ in sys.stdin:
        model.zero_grad()
        start = time.perf_counter()
        loss = model(input_ids=ids, use_cache=False).last_hidden_state.square().mean()
        loss.backward()
        seconds = time.perf_counter() - start
        results = sha256(loss.detach().numpy().tobytes())
        for p in model.parameters():
            if p.grad is not None:
                results.update(p.grad.numpy().tobytes())
        print(seconds, results.hexdigest(), flush=True)


class Worker:
    """Process that runs training steps with one setting."""

    def __init__(self, environment: dict[str, str], threads: int, tokens: int) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", "--tokens", str(tokens)],
            env={**inherited, "OMP_NUM_THREADS": str(threads), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> tuple[float, str]:
        """Run a step. Return its time in seconds, and a hash of its loss and gradients."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, results = self.process.stdout.readline().split()
        return float(seconds), results


def measure_median_times(workers: Sequence[Worker], rounds: int) -> list[float]:
    """Return the median time of a step for each worker, in seconds."""
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for worker, worker_times in zip(workers, times, strict=True):
            worker_times.append(worker.step()[0])
        print([f"{worker_times[-1] * 1e3:,.0f} ms" for worker_times in times], file=sys.stderr)
    return [statistics.median(worker_times) for worker_times in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="number of timed steps per setting")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="number of OpenMP threads per process")
    parser.add_argument("--tokens", type=int, default=1024, help="number of tokens per step")
    parser.add_argument("--niceness", type=int, default=10, help="niceness of the endless loops, from 0 to 19")
    parser.add_argument("--loops", type=int, default=1, help="number of endless loops")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run_steps(args.tokens)
        return
    workers = []
    try:
        results = {}
        for (
            name,
            environment,
        ) in SETTINGS.items():  # each warm-up runs on an idle machine
            workers.append(Worker(environment, args.threads, args.tokens))
            results[name] = workers[-1].step()[1]  # warm-up
        several_threads = [value for name, value in results.items() if name != ONE_THREAD]
        assert len(set(several_threads)) == 1, "the results depend on the OpenMP settings"
        alone = measure_median_times(workers, args.rounds)
        endless_loop = ["nice", "-n", str(args.niceness), sys.executable, "-c", "while True: pass"]
        loops = [subprocess.Popen(endless_loop) for _ in range(args.loops)]
        try:
            busy = measure_median_times(workers, args.rounds)
        finally:
            for loop in loops:
                loop.kill()
    finally:
        for worker in workers:
            worker.process.kill()
    print(f"{args.threads} threads, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    print("| setting | alone, ms | next to the loops, ms | ratio to alone |\n|---|---|---|---|")
    for name, alone_time, busy_time in zip(SETTINGS, alone, busy, strict=True):
        print(f"| {name} | {alone_time * 1e3:,.0f} | {busy_time * 1e3:,.0f} | {busy_time / alone_time:.2f}x |")


if __name__ == "__main__":
    main()
