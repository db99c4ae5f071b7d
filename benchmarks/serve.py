"""Measure the throughput of `/embed` with many clients, using dynamic batching or one text at a time.

    python benchmarks/serve.py MODEL [--clients 32] [--duration 30] [--precision auto fp32] [--only batched] [--restart]

Each variant is a separate `llm2clip serve` process, with `--batch_size 1` or the default batch size. Each client is a
thread that repeatedly sends a text of 5 to 40 words and waits for its embedding. The server's embeddings are compared
with the model's own. `--restart` stops the server with SIGTERM half-way through and starts it again. Clients retry
after connection errors, so every text must eventually get its embedding.
"""

import argparse
import http.client
import json
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np

from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder

PORT = 7961
WORDS = "a red dog and an old man play in the snow behind a small blue house near the street while children look on"
RETRIES, RETRY_SECONDS = 600, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32, help="number of clients")
    parser.add_argument("--duration", type=float, default=30, help="duration of each variant, in seconds")
    parser.add_argument("--precision", nargs="+", default=["auto"], help="text-encoding precisions to compare")
    parser.add_argument("--only", choices=["one at a time", "batched"], help="measure only this variant")
    parser.add_argument("--restart", action="store_true", help="restart the server half-way through")
    args = parser.parse_args()
    model = open_dual_encoder(args.model)
    print("| variant | texts/s | speed-up | median, ms | p95, ms | errors | lowest cosine to the model |")
    print("|---|---|---|---|---|---|---|")
    first_rate = None
    for precision in args.precision:
        for name, batch_size in (("one at a time", 1), ("batched", 32)):
            if args.only not in (None, name):
                continue
            clients, seconds = run_clients(args, batch_size, precision)
            milliseconds = [1000 * latency for client in clients for latency in client.latencies]
            rate = len(milliseconds) / seconds
            first_rate = first_rate or rate
            p95 = statistics.quantiles(milliseconds, n=20)[-1]
            print(
                f"| {name}, {precision} | {rate:.1f} | {rate / first_rate:.2f}x | "
                f"{statistics.median(milliseconds):.0f} | {p95:.0f} | {describe_errors(clients)} | "
                f"{smallest_cosine(clients, model):.6f} |",
                flush=True,
            )


class Client(threading.Thread):
    """Client that sends texts until `stop` is set, and records latencies in seconds, error counts and embeddings."""

    def __init__(self, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self.random, self.stop = random.Random(seed), stop
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()
        self.vectors: list[tuple[str, list[float]]] = []
        self.unanswered = 0

    def run(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", PORT)
        while not self.stop.is_set():
            text = " ".join(self.random.choices(WORDS.split(), k=self.random.randint(5, 40)))
            start = time.perf_counter()
            for _ in range(RETRIES):
                vector = self.embed(text)
                if vector is not None:
                    self.latencies.append(time.perf_counter() - start)
                    self.vectors.append((text, vector))
                    break
                time.sleep(RETRY_SECONDS)
            else:
                self.unanswered += 1

    def embed(self, text: str) -> list[float] | None:
        """Send a request and return the embedding. After an error, count the error and return None."""
        try:
            headers = {"content-type": "application/json"}
            self.connection.request("POST", "/embed", json.dumps({"input": text}), headers)
            response = self.connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.errors[type(error).__name__] += 1
            self.connection = http.client.HTTPConnection("127.0.0.1", PORT)
            return None
        if response.status != 200:
            self.errors[str(response.status)] += 1
            return None
        vector: list[float] = json.loads(body)["data"][0]["embedding"]
        return vector


def run_clients(args: argparse.Namespace, batch_size: int, precision: str) -> tuple[list[Client], float]:
    """Start a server and run all clients. Return the clients and the elapsed time in seconds."""
    server = start_server(args.model, batch_size, precision)
    stop = threading.Event()
    clients = [Client(seed, stop) for seed in range(args.clients)]
    start = time.perf_counter()
    for client in clients:
        client.start()
    time.sleep(args.duration / 2)
    if args.restart:
        stop_server(server)
        server = start_server(args.model, batch_size, precision)
    time.sleep(args.duration / 2)
    stop.set()
    for client in clients:
        client.join()
    seconds = time.perf_counter() - start
    stop_server(server)
    return clients, seconds


def start_server(model: str, batch_size: int, precision: str) -> subprocess.Popen[bytes]:
    """Start a server and wait until it responds."""
    command = [sys.executable, "-m", "llm2clip", "serve", "--model", model, "--port", str(PORT), "--no_token"]
    command += ["--batch_size", str(batch_size), "--precision", precision]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT)
            connection.request("GET", "/health")
            connection.getresponse().read()
            return server
        except OSError:
            if server.poll() is not None:
                raise SystemExit(f"the server stopped with exit status {server.returncode}") from None
            time.sleep(0.2)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    server.wait()


def describe_errors(clients: list[Client]) -> str:
    errors: Counter[str] = Counter()
    for client in clients:
        errors.update(client.errors)
    counts = ", ".join(f"{kind}: {count}" for kind, count in errors.items()) or "none"
    return f"{counts}; texts without a response: {sum(client.unanswered for client in clients)}"


def smallest_cosine(clients: list[Client], model: DualEncoder) -> float:
    """Return the lowest cosine similarity of the server's embeddings (first and last per client) to the model's."""
    samples = [client.vectors[n] for client in clients if client.vectors for n in (0, -1)]
    expected = model.encode_texts([text for text, _ in samples]).numpy()
    vectors = np.array([vector for _, vector in samples])
    return float((expected * vectors).sum(1).min())


if __name__ == "__main__":
    main()
