"""Time of the first search after a cold load, and of later searches, in a gallery opened in Chromium.

    llm2clip export MODEL --to gallery --index INDEX --out GALLERY
    python benchmarks/gallery.py GALLERY

Serves the folder with Python's static file server. Requires the `dev` extra and Chromium. A cold load starts a new
browser with an empty cache, and enters the query as soon as the page accepts one. Later searches follow one second
after the thumbnails of the previous results have been loaded.
"""

import argparse
import functools
import http.server
import json
import shutil
import statistics
import threading
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

QUERIES = (
    "a dog on a beach",
    "two children",
    "a red car",
    "people at a market in the evening",
    "snow",
    "a man on a bike",
)
# Runs in the page: waits until a search has finished, and returns the milliseconds since `start`.
SEARCH = """async ([text, fromNavigation]) => {
  const start = fromNavigation ? 0 : performance.now(), status = document.getElementById('status');
  document.getElementById('text').value = text;
  document.getElementById('form').requestSubmit();
  while (document.body.classList.contains('searching')) await new Promise((resolve) => setTimeout(resolve, 1));
  if (status.classList.contains('error')) throw new Error(status.textContent);
  return performance.now() - start;
}"""
# Images below the visible part are loaded only when the user scrolls.
THUMBNAILS_ARE_LOADED = """() => [...document.querySelectorAll('#grid img')]
  .every((image) => image.complete || image.getBoundingClientRect().top > 2 * innerHeight)"""


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def measure(address: str, executable: str) -> tuple[float, list[float]]:
    """Return the time of the first search, counted from the start of the navigation, and of each later one, in ms."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(address, wait_until="commit")
        page.wait_for_function("() => window.gallery", polling=5)
        first = page.evaluate(SEARCH, ["a boy", True])
        later = []
        for query in QUERIES:
            page.wait_for_function(THUMBNAILS_ARE_LOADED)
            page.wait_for_timeout(1000)
            later.append(page.evaluate(SEARCH, [query, False]))
        browser.close()
    return first, later


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gallery", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise SystemExit("Chromium is not installed")
    handler = functools.partial(QuietHandler, directory=str(args.gallery))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        runs = [measure(f"http://127.0.0.1:{server.server_address[1]}/", executable) for _ in range(args.repeats)]
        server.shutdown()
    later = [time for _, times in runs for time in times]
    print(f"images: {json.loads((args.gallery / 'gallery.json').read_text())['count']:,}")
    print("first search after a cold load: " + ", ".join(f"{first / 1000:.2f} s" for first, _ in runs))
    print(f"later searches: median {statistics.median(later):.0f} ms, slowest {max(later):.0f} ms")


if __name__ == "__main__":
    main()
