"""Throughput of `/embed` under many clients: requests batched together on the model, against one at a time.

    python benchmarks/serve.py MODEL [--clients 32] [--seconds 30] [--precision auto fp32] [--only batched] [--restart]

Each way is `llm2clip serve` in a process of its own, the first with `--batch 1`; clients are threads that send a text
of 5 to 40 words and wait for its vector, again and again. Answers are compared with the model's own. `--restart` stops
and starts the server in the middle (SIGTERM); clients ask again after a refused connection, and every text must have
got its vector in the end.
"""

from __future__ import annotations

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

import numpy as np

from llm2clip.models.dual_encoder import open_dual_encoder

PORT = 7961
TALE = "a red dog and an old man play in the snow behind a small blue house near the street while children look on"


def started(model: str, batch: int, precision: str) -> subprocess.Popen[bytes]:
    """A server that answers."""
    command = [sys.executable, "-m", "llm2clip", "serve", "--model", model, "--port", str(PORT)]
    command += ["--batch", str(batch), "--precision", precision]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", PORT)
            connection.request("GET", "/health")
            connection.getresponse().read()
            return server
        except OSError:
            time.sleep(0.2)


def stopped(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    server.wait()


class Client(threading.Thread):
    """Asks until it is told to end; keeps latencies, errors by kind, and some answers."""

    def __init__(self, number: int, end: threading.Event) -> None:
        super().__init__()
        self.random, self.end = random.Random(number), end
        self.times: list[float] = []
        self.errors: dict[str, int] = {}
        self.answers: list[tuple[str, list[float]]] = []
        self.unanswered = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT)
        while not self.end.is_set():
            text = " ".join(self.random.choices(TALE.split(), k=self.random.randint(5, 40)))
            start = time.perf_counter()
            for _ in range(600):
                try:
                    body = json.dumps({"input": text})
                    connection.request("POST", "/embed", body, {"content-type": "application/json"})
                    answer = connection.getresponse()
                    data = answer.read()
                    if answer.status == 200:
                        self.times.append(time.perf_counter() - start)
                        self.answers.append((text, json.loads(data)["data"][0]["embedding"]))
                        break
                    self.errors[str(answer.status)] = self.errors.get(str(answer.status), 0) + 1
                except (OSError, http.client.HTTPException) as error:
                    kind = type(error).__name__
                    self.errors[kind] = self.errors.get(kind, 0) + 1
                    connection = http.client.HTTPConnection("127.0.0.1", PORT)
                time.sleep(0.1)
            else:
                self.unanswered += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--precision", nargs="+", default=["auto"], help="of the texts, one after the other")
    parser.add_argument("--only", choices=["one at a time", "batched"])
    parser.add_argument("--restart", action="store_true")
    given = parser.parse_args()
    dual, rates = open_dual_encoder(given.model), []
    ways = [
        (f"{name}, {precision}", batch, precision)
        for precision in given.precision
        for name, batch in (("one at a time", 1), ("batched", 32))
        if given.only in (None, name)
    ]
    print(
        "| way | answers/s | against the first | median, ms | p95, ms | errors | smallest cosine with the model's own |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, batch, precision in ways:
        server = started(given.model, batch, precision)
        end = threading.Event()
        crowd = [Client(n, end) for n in range(given.clients)]
        start = time.perf_counter()
        for client in crowd:
            client.start()
        time.sleep(given.seconds / 2)
        if given.restart:
            stopped(server)
            server = started(given.model, batch, precision)
        time.sleep(given.seconds / 2)
        end.set()
        for client in crowd:
            client.join()
        rates.append(sum(len(c.times) for c in crowd) / (time.perf_counter() - start))
        stopped(server)
        times = [1000 * t for c in crowd for t in c.times]
        errors: dict[str, int] = {}
        for client in crowd:
            for kind, count in client.errors.items():
                errors[kind] = errors.get(kind, 0) + count
        some = [client.answers[n] for client in crowd for n in (0, -1) if client.answers]
        own = dual.encode_texts([text for text, _ in some]).numpy()
        cosine = (own * np.array([vector for _, vector in some])).sum(1).min()
        lost = sum(client.unanswered for client in crowd)
        told = ", ".join(f"{kind}: {count}" for kind, count in errors.items()) or "none"
        print(
            f"| {name} | {rates[-1]:.1f} | {rates[-1] / rates[0]:.2f}x | {statistics.median(times):.0f} | "
            f"{statistics.quantiles(times, n=20)[-1]:.0f} | {told}; unanswered {lost} | {cosine:.6f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
