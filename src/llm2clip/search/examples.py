"""Example queries and the newest images of an index, for the first screen of the search page."""

import random
import threading
import time

from pydantic import BaseModel, Field

from llm2clip.search.backends import Backend

SAMPLE_SIZE = 64  # number of images whose captions are read; equal indexes give equal samples
MAX_QUERIES, MAX_NEWEST = 6, 12  # numbers of example queries and newest images
MIN_LENGTH, MAX_LENGTH = 4, 200  # of an example query, in characters
MAX_AGE = 600.0  # maximum age of cached examples, in seconds


class NewImage(BaseModel):
    """One of the newest images."""

    id: str
    file_name: str


class ExamplesResponse(BaseModel):
    """Suggestions for a first search."""

    queries: list[str] = Field(
        description="short captions from a sample of the images; empty if the sample has no captions"
    )
    newest: list[NewImage] = Field(description="the newest images in the index, newest first")


class ExampleCache:
    """Cached examples of one index. Thread-safe."""

    def __init__(self) -> None:
        self._examples = ExamplesResponse(queries=[], newest=[])
        self._time = -float("inf")
        self._lock = threading.Lock()

    def get(self, backend: Backend) -> ExamplesResponse:
        """Return the examples of an index, which may be up to MAX_AGE seconds old."""
        with self._lock:
            if time.monotonic() - self._time <= MAX_AGE:
                return self._examples
            self._time = time.monotonic()  # other threads return the old examples, even if reading the index fails
        self._examples = ExamplesResponse(queries=choose_queries(backend), newest=find_newest(backend))
        return self._examples


def choose_queries(backend: Backend) -> list[str]:
    """Return up to MAX_QUERIES captions from a sample of the images, chosen from the shorter half of these captions."""
    captions: dict[str, None] = {}
    for hit_id in backend.sample_ids(SAMPLE_SIZE):
        for image in backend.images(hit_id)[:1]:
            for caption in image.captions[:1]:
                text = " ".join(caption.split())
                if MIN_LENGTH <= len(text) <= MAX_LENGTH:
                    captions[text] = None
    shortest = sorted(captions, key=len)[: max(MAX_QUERIES, len(captions) // 2)]
    return random.sample(shortest, min(MAX_QUERIES, len(shortest)))


def find_newest(backend: Backend) -> list[NewImage]:
    """Return the newest images of an index, newest first."""
    newest = []
    for hit_id in backend.newest_ids(MAX_NEWEST):
        for image in backend.images(hit_id)[:1]:
            newest.append(NewImage(id=hit_id, file_name=image.file_name))
    return newest
