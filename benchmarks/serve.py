"""Measure the throughput of `/embed` with many clients, using dynamic batching or one text at a time.

    python benchmarks/serve.py MODEL

Each variant is a separate `llm2clip serve` process, with `--batch_size 1` or the default batch size. Each client is a
thread that repeatedly sends a text of 5 to 40 words and waits for its embedding.
"""

import http.client
import json
import random
import statistics
import threading
import time

from shared import make_parser, print_header, print_row, start_server

CLIENTS, SECONDS, TOKEN = 32, 30, "benchmark"
WORDS = "a red dog and an old man play in the snow behind a small blue house near the street while children look on"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}


class Client(threading.Thread):
    """Client that sends texts until `stop` is set, and records latencies in seconds."""

    def __init__(self, seed: int, port: int, stop: threading.Event) -> None:
        super().__init__()
        self.random, self.port, self.stop = random.Random(seed), port, stop
        self.latencies: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        while not self.stop.is_set():
            text = " ".join(self.random.choices(WORDS.split(), k=self.random.randint(5, 40)))
            start = time.perf_counter()
            connection.request("POST", "/embed", json.dumps({"input": text}), HEADERS)
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            self.latencies.append(time.perf_counter() - start)


def run_clients(model: str, flags: list[str]) -> list[Client]:
    """Start a server and run all clients for `SECONDS` seconds."""
    server, port = start_server(None, TOKEN, flags=["--model", model, *flags])
    stop = threading.Event()
    clients = [Client(seed, port, stop) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(SECONDS)
    stop.set()
    for client in clients:
        client.join()
    server.terminate()
    server.wait()
    return clients


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model")
    args = parser.parse_args()
    print_header("mode", "requests/s", "median, ms", "p95, ms")
    for precision in ("auto", "fp32"):
        for name, batch_size in (("one at a time", "1"), ("batched", "32")):
            flags = ["--batch_size", batch_size, "--precision", precision]
            clients = run_clients(args.model, flags)
            latencies = [1000 * latency for client in clients for latency in client.latencies]
            median, p95 = statistics.median(latencies), statistics.quantiles(latencies, n=20)[-1]
            print_row(f"{name}, {precision}", f"{len(latencies) / SECONDS:.1f}", f"{median:.0f}", f"{p95:.0f}")


if __name__ == "__main__":
    main()
