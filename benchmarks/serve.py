"""Measure the throughput of `/embed` with many clients, using dynamic batching or one text at a time.

    python benchmarks/serve.py MODEL

Each variant is a separate `llm2clip serve` process, with `--batch_size 1` or the default batch size. Each client sends
texts of 5 to 40 words, one after the other.
"""

import http.client
import json
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from shared import make_parser, print_header, print_row, start_server

CLIENTS, SECONDS, TOKEN = 32, 30, "benchmark"
WORDS = "a red dog and an old man play in the snow behind a small blue house near the street while children look on"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


def send_texts(port: int, seed: int) -> list[float]:
    """Send random texts for `SECONDS` seconds, one after the other. Return the latencies in seconds."""
    rng = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    latencies = []
    end = time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        text = " ".join(rng.choices(WORDS.split(), k=rng.randint(5, 40)))
        connection.request("POST", "/embed", json.dumps({"input": text}), HEADERS)
        response = connection.getresponse()
        response.read()
        assert response.status == 200
        latencies.append(time.perf_counter() - start)
    return latencies


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model")
    args = parser.parse_args()
    print_header("mode", "requests/s", "median, ms", "p95, ms")
    for precision in ("auto", "fp32"):
        for name, batch_size in (("one at a time", "1"), ("batched", "32")):
            flags = ["--model", args.model, "--batch_size", batch_size, "--precision", precision]
            server, port = start_server(None, TOKEN, flags=flags)
            with ThreadPoolExecutor(CLIENTS) as pool:
                clients = pool.map(partial(send_texts, port), range(CLIENTS))
                latencies = [1000 * latency for client in clients for latency in client]
            server.terminate()
            server.wait()
            median, p95 = statistics.median(latencies), statistics.quantiles(latencies, n=20)[-1]
            print_row(f"{name}, {precision}", f"{len(latencies) / SECONDS:.1f}", f"{median:.0f}", f"{p95:.0f}")


if __name__ == "__main__":
    main()
