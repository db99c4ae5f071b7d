"""Tests of the search page in a real browser: the system's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HANG_TIMEOUT
from llm2clip.models.dual_encoder import DualEncoder
from search_fixtures import add_red_detector, create_patient_app, make_index, running_server

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dual_encoder: DualEncoder) -> Iterator[str]:
    """Address of a running server with an index."""
    index = make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder)
    model = add_red_detector(dual_encoder, "a red one")
    with running_server(create_patient_app(model, index)) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=HANG_TIMEOUT * 1000)
        yield browser
        browser.close()


@pytest.fixture(params=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Any]:
    """The open page. At the end, checks that it sent no request to another server and that the console is empty."""
    size = {"width": 1200, "height": 800} if request.param == "wide" else {"width": 380, "height": 700}
    context = browser.new_context(viewport=size, color_scheme="dark" if request.param == "phone" else "light")
    context.set_default_timeout(HANG_TIMEOUT * 1000)
    page, console_messages, requested_urls = context.new_page(), [], []
    page.on("console", lambda message: console_messages.append(message.text))
    page.on("pageerror", lambda error: console_messages.append(str(error)))
    page.on("request", lambda request: requested_urls.append(request.url))
    page.goto(address)
    wait_until(page, "document.activeElement.id === 'text'")  # autofocus may follow the load event
    yield page
    assert all(url.startswith((address, "data:", "blob:")) for url in requested_urls)
    # Chromium logs error responses, which some tests provoke.
    assert not [message for message in console_messages if not message.startswith("Failed to load resource")]
    context.close()


def wait_until(page: Any, expression: str) -> None:
    """Wait until a JavaScript expression is true. The page's security policy requires a function here."""
    page.wait_for_function(f"() => {expression}")


def wait_for_hits(page: Any, count: int = 36) -> Any:
    """Wait until no search is in progress and there are this many results, and return the results.

    A search in progress would replace the results later, and close the detail view.
    """
    is_idle = "!document.body.classList.contains('searching')"
    wait_until(page, f"{is_idle} && document.querySelectorAll('#grid li').length === {count}")
    return page.locator("#grid li")


def test_text_search_detail_view_and_more_like_this(page: Any) -> None:
    assert page.locator("#empty").is_visible()
    page.keyboard.type("a red one,")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in the middle")
    page.keyboard.press("Enter")
    assert wait_for_hits(page).first.is_visible() and not page.locator("#empty").is_visible()
    assert "36 images" in page.locator("#status").inner_text()
    scores = [float(text) for text in page.locator("#grid .score").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page must not scroll horizontally"
    page.locator("#grid button").nth(1).click()
    assert page.locator("#detail").is_visible()
    name = page.locator("#locations li").first.inner_text().splitlines()[0]
    wait_until(page, "document.getElementById('large').naturalWidth === 48")
    page.keyboard.press("ArrowRight")
    assert page.locator("#locations li").first.inner_text().splitlines()[0] != name
    page.keyboard.press("ArrowLeft")
    page.locator("#like").click()
    wait_until(page, "document.querySelector('#grid .score').textContent === '1.000'")
    assert not page.locator("#detail").is_visible() and page.locator(".chip").count() == 1
    assert page.locator("#grid .name").first.inner_text() == name.rsplit("/", 1)[-1]
    page.go_back()
    wait_until(page, "document.getElementById('text').value.startsWith('a red one')")
    wait_for_hits(page)
    page.locator("#grid button").first.click()
    page.locator("#unlike").click()
    wait_until(page, "document.querySelectorAll('.chip.negative').length === 1")
    wait_for_hits(page)
    page.locator(".chip.negative").click()
    wait_until(page, "document.querySelectorAll('.chip').length === 0")


def test_heat_map_is_drawn_over_the_image(page: Any, address: str) -> None:
    page.locator("#text").fill("a red one")
    page.keyboard.press("Enter")
    wait_for_hits(page)
    names = page.locator("#grid .name").all_inner_texts()
    page.locator("#grid button").nth(names.index("0.png")).click()  # its left half is red
    wait_until(page, "document.getElementById('large').naturalWidth === 48")
    page.locator("#where").click()
    page.locator("#heatmap").wait_for()
    assert "Bright: most similar to the query (1.000)" in page.locator("#heatmap-status").inner_text()
    opacities = """() => {
        const {width, height} = heatmap, row = heatmap.getContext('2d').getImageData(0, height / 2, width, 1).data;
        return [0.2, 0.8].map((share) => row[4 * Math.floor(share * width) + 3]);
    }"""
    left, right = page.evaluate(opacities)
    assert left == 0 and right > 190
    boxes = [page.locator(name).bounding_box() for name in ("#large", "#heatmap")]
    assert boxes[0] == pytest.approx(boxes[1], abs=1)
    assert page.evaluate("heatmap.width / heatmap.height") == pytest.approx(48 / 40, abs=0.01)
    page.keyboard.press("w")
    assert not page.locator("#heatmap").is_visible()
    page.keyboard.press("w")
    page.locator("#heatmap").wait_for()
    page.locator("#next" if page.locator("#next").is_enabled() else "#back").click()
    assert not page.locator("#heatmap").is_visible() and page.locator("#heatmap-status").inner_text() == ""
    page.route("**/heatmap", lambda route: route.fulfill(status=404, json={"error": {"message": "it is gone"}}))
    page.locator("#where").click()
    wait_until(page, "document.getElementById('heatmap-status').textContent === 'it is gone'")
    assert page.locator("#where").get_attribute("aria-pressed") == "false"


def test_keyboard_navigation(page: Any) -> None:
    page.keyboard.type("blue")
    page.keyboard.press("Enter")
    wait_for_hits(page)
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
    page.locator("#detail").wait_for(state="hidden")
    assert page.evaluate(focused) == 1 + columns
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "text" and page.locator("#text").input_value() == "blue"


def test_closing_the_detail_view_keeps_the_focus_in_the_search_box(page: Any) -> None:
    page.locator("#text").fill("blue")
    page.keyboard.press("Enter")
    wait_for_hits(page).first.locator("button").click()
    close_and_focus = """() => new Promise((done) => {
        const detail = document.getElementById('detail'), text = document.getElementById('text');
        detail.addEventListener('close', () => setTimeout(() => done(document.activeElement.id)));
        detail.close();
        text.focus();  // before the close event fires
    })"""
    assert page.evaluate(close_and_focus) == "text"


def test_chosen_and_dropped_images(page: Any, image_folder: Path) -> None:
    page.locator("#file").set_input_files(image_folder / "4.png")
    wait_until(page, "document.querySelector('#grid .score')?.textContent === '1.000'")
    assert page.locator("#grid .name").first.inner_text() == "4.png"
    drop_file = """async (url) => {
        const blob = await (await fetch(url)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], 'x.png', {type: 'image/png'}));
        dispatchEvent(new DragEvent('dragenter', {dataTransfer: data, bubbles: true}));
        const shown = !document.getElementById('drop').hidden;
        dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
        return shown && document.getElementById('drop').hidden;
    }"""
    page.locator(".chip").click()
    wait_until(page, "document.querySelectorAll('#grid li').length === 0")
    assert page.evaluate(drop_file, "/image/9")
    wait_until(page, "document.querySelector('#grid .score')?.textContent === '1.000'")
    assert page.locator(".chip img").count() == 1


def test_empty_results_and_errors_are_shown(page: Any, image_folder: Path, tmp_path: Path) -> None:
    page.locator("#more").click()
    page.locator("#path").fill("/nowhere")
    page.locator("#text").fill("red")
    page.locator("button.primary[type=submit]").click()
    wait_until(page, "document.getElementById('status').textContent.startsWith('No results')")
    page.locator("#path").fill("")
    page.locator("#caption").fill("BLUE left half")
    page.locator("#text").press("Enter")
    assert wait_for_hits(page, 1).locator(".name").inner_text() == "12.png"
    (tmp_path / "a.png").write_bytes(b"not an image")
    page.locator("#file").set_input_files(tmp_path / "a.png")
    wait_until(page, "document.getElementById('status').textContent.includes('not an image')")
    assert page.locator("#status.error").is_visible() and page.locator("#grid li").count() == 0
    page.locator(".chip").click()
    wait_for_hits(page, 1)
    page.context.set_offline(True)
    page.locator("#text").press("Enter")
    wait_until(page, "document.getElementById('status').textContent.includes('is not responding')")
    page.context.set_offline(False)
