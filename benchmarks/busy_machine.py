"""Measure CPU training speed while another process uses the CPU, for several OpenMP settings.

    python benchmarks/busy_machine.py

A step is a forward and a backward pass through 12 float32 transformer layers of SmolLM2-135M's shape. Each setting has
its own process, because OpenMP reads its settings when it is loaded. The steps are first run alone, and then next to an
endless loop. The table shows the median time of a step.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from transformers import AutoConfig, AutoModel

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.tools.plan_costs import LLMS
from measurements import run_in_new_process
from shared import print_header, print_row

STEPS, TOKENS = 3, 1024
SETTINGS = {
    "GOMP_SPINCOUNT=300000 (libgomp's default)": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=0 (llm2clip's default)": {"GOMP_SPINCOUNT": "0"},
}


def measure_steps() -> tuple[float, float]:
    """Return the median seconds of a step alone, and next to an endless loop."""
    torch.manual_seed(0)
    keep_freed_memory(torch.device("cpu"))
    shape = {**LLMS["smollm2-135m"], "num_hidden_layers": 12, "vocab_size": 1000}
    model = AutoModel.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    ids = torch.randint(1000, (TOKENS // 32, 32))

    def run_step() -> float:
        model.zero_grad()
        start = time.perf_counter()
        model(input_ids=ids, use_cache=False).last_hidden_state.square().mean().backward()
        return time.perf_counter() - start

    run_step()  # warm-up
    alone = statistics.median(run_step() for _ in range(STEPS))
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return alone, statistics.median(run_step() for _ in range(STEPS))
    finally:
        loop.kill()


def main() -> None:
    print(f"{os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f}")
    print_header("setting", "alone, ms", "next to the loop, ms", "ratio")
    os.environ.pop("OMP_NUM_THREADS", None)
    for name, environment in SETTINGS.items():
        os.environ.update(environment)  # read by the new process
        alone, busy = run_in_new_process(measure_steps)
        print_row(name, f"{1e3 * alone:,.0f}", f"{1e3 * busy:,.0f}", f"{busy / alone:.2f}x")


if __name__ == "__main__":
    main()
