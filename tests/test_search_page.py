"""The page in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.server import create_app
from search_fixtures import make_index, make_model, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Iterator[str]:
    """A server on a free port, in a thread."""
    model = open_dual_encoder(str(make_model(tmp_path_factory.mktemp("model"))))
    with running_server(create_app(model, make_index(tmp_path_factory.mktemp("index"), pictures, model))) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at its end nothing was asked of another server, and the console is clean."""
    size = {"width": 1200, "height": 800} if request.param == "wide" else {"width": 380, "height": 700}
    context = browser.new_context(viewport=size, color_scheme="dark" if request.param == "phone" else "light")
    page, troubles, asked = context.new_page(), [], []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert not [t for t in troubles if not t.startswith("Failed to load resource")]  # refusals are tests, too
    context.close()


def until(page: Any, true: str) -> None:
    """Wait for an expression; as a function, since the page's policy forbids to evaluate text."""
    page.wait_for_function(f"() => {true}", timeout=15_000)


def found(page: Any, count: int = 36) -> Any:
    until(page, f"document.querySelectorAll('#grid li').length === {count}")
    return page.locator("#grid li")


def test_from_a_text_to_more_like_this(page: Any) -> None:
    assert page.locator("#empty").is_visible() and page.evaluate("document.activeElement.id") == "text"
    page.keyboard.type("a red one,")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in the middle")
    page.keyboard.press("Enter")
    assert found(page).first.is_visible() and not page.locator("#empty").is_visible()
    assert "36 pictures" in page.locator("#status").inner_text()
    scores = [float(text) for text in page.locator("#grid .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it must not scroll sideways"
    page.locator("#grid button").nth(1).click()
    assert page.locator("#detail").is_visible()
    name = page.locator("#places li").first.inner_text().splitlines()[0]
    until(page, "document.getElementById('large').naturalWidth === 48")
    page.keyboard.press("ArrowRight")
    assert page.locator("#places li").first.inner_text().splitlines()[0] != name
    page.keyboard.press("ArrowLeft")
    page.locator("#like").click()
    until(page, "document.querySelector('#grid .score').textContent === '1.000'")
    assert not page.locator("#detail").is_visible() and page.locator(".chip").count() == 1
    assert page.locator("#grid .name").first.inner_text() == name.rsplit("/", 1)[-1]
    page.go_back()
    until(page, "document.getElementById('text').value.startsWith('a red one')")
    page.locator("#grid button").first.click()
    page.locator("#unlike").click()
    until(page, "document.querySelectorAll('.chip.without').length === 1")
    found(page)
    page.locator(".chip.without").click()
    until(page, "document.querySelectorAll('.chip').length === 0")


def test_by_keys_alone(page: Any) -> None:
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    found(page)
    page.keyboard.press("ArrowDown")
    focused = "[...document.querySelectorAll('#grid button')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    columns = page.evaluate("getComputedStyle(document.getElementById('grid')).gridTemplateColumns.split(' ').length")
    assert page.evaluate(focused) == 1 + columns > 2
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible() and page.evaluate(focused) == 1 + columns
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text" and page.locator("#text").input_value() == "blue"


def test_a_closed_detail_view_takes_no_focus_back(page: Any) -> None:
    page.locator("#text").fill("blue")
    page.keyboard.press("Enter")
    found(page).first.locator("button").click()
    hurry = """() => new Promise((done) => {
        const detail = document.getElementById('detail'), text = document.getElementById('text');
        detail.addEventListener('close', () => setTimeout(() => done(document.activeElement.id)));
        detail.close();
        text.focus();  // before the browser tells of the closing
    })"""
    assert page.evaluate(hurry) == "text"


def test_a_picture_chosen_and_one_dropped(page: Any, pictures: Path) -> None:
    page.locator("#file").set_input_files(pictures / "4.png")
    until(page, "document.querySelector('#grid .score')?.textContent === '1.000'")
    assert page.locator("#grid .name").first.inner_text() == "4.png"
    drop = """async (url) => {
        const blob = await (await fetch(url)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], 'x.png', {type: 'image/png'}));
        dispatchEvent(new DragEvent('dragenter', {dataTransfer: data, bubbles: true}));
        const shown = !document.getElementById('drop').hidden;
        dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
        return shown && document.getElementById('drop').hidden;
    }"""
    page.locator(".chip").click()
    until(page, "document.querySelectorAll('#grid li').length === 0")
    assert page.evaluate(drop, "/picture/9")
    until(page, "document.querySelector('#grid .score')?.textContent === '1.000'")
    assert page.locator(".chip img").count() == 1


def test_nothing_and_errors_are_said(page: Any, pictures: Path, tmp_path: Path) -> None:
    page.locator("#more").click()
    page.locator("#under").fill("/nowhere")
    page.locator("#text").fill("red")
    page.locator("button.main[type=submit]").click()
    until(page, "document.getElementById('status').textContent.startsWith('Nothing found')")
    page.locator("#under").fill("")
    page.locator("#caption").fill("BLUE left half")
    page.locator("#text").press("Enter")
    assert found(page, 1).locator(".name").inner_text() == "12.png"
    (tmp_path / "a.png").write_bytes(b"no picture")
    page.locator("#file").set_input_files(tmp_path / "a.png")
    until(page, "document.getElementById('status').textContent.includes('not a picture')")
    assert page.locator("#status.bad").is_visible() and page.locator("#grid li").count() == 0
    page.locator(".chip").click()
    found(page, 1)
    page.context.set_offline(True)
    page.locator("#text").press("Enter")
    until(page, "document.getElementById('status').textContent.includes('does not answer')")
    page.context.set_offline(False)
