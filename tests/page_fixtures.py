"""The system's Chromium, driven by Playwright, and an open page, for the tests of search pages.

A test file that uses `page` defines two more fixtures: `address`, the page's address, and `ready`, a JavaScript
expression that is true as soon as the page can be used.
"""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import HANG_TIMEOUT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

on_both_devices = pytest.mark.parametrize("page", ["wide", "phone"], indirect=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=HANG_TIMEOUT * 1000)
        yield browser
        browser.close()


@pytest.fixture
def page(request: pytest.FixtureRequest, browser: Any, address: str, ready: str) -> Iterator[Any]:
    """The open page. At the end, checks that it sent no request to another server and that the console is empty."""
    options: dict[str, Any] = {"viewport": {"width": 1200, "height": 800}, "color_scheme": "light"}
    if getattr(request, "param", "wide") == "phone":
        options = {"viewport": {"width": 380, "height": 700}, "color_scheme": "dark", "has_touch": True}
        options["is_mobile"] = True
    context = browser.new_context(**options)
    context.set_default_timeout(HANG_TIMEOUT * 1000)
    page, console_messages, requested_urls = context.new_page(), [], []
    page.on("console", lambda message: console_messages.append(message.text))
    page.on("pageerror", lambda error: console_messages.append(str(error)))
    page.on("request", lambda request: requested_urls.append(request.url))
    page.goto(address)
    wait_until(page, ready)
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in requested_urls)
    # Chromium logs error responses, which some tests provoke, and files that it preloaded but did not use.
    ignored = ("Failed to load resource", "preload")
    assert not [message for message in console_messages if not any(text in message for text in ignored)]
    context.close()


def wait_until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true. The page's security policy requires a function here."""
    page.wait_for_function(f"() => {expression}", polling=50)  # the default waits for frames, which popups may not draw
