"""Tests of the search page in a real browser: the system's Chromium, driven by Playwright."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.inference import ServerLimits
from llm2clip.search.server import AccessPolicy, create_app
from page_fixtures import on_both_devices, wait_until
from search_fixtures import (
    HANG_TIMEOUT,
    add_red_detector,
    create_patient_app,
    make_index,
    reject_all_texts,
    running_server,
)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dual_encoder: DualEncoder) -> Iterator[str]:
    """Address of a running server with an index."""
    index = make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder)
    model = add_red_detector(dual_encoder, "a red one")
    app = create_app(model, index, ServerLimits(timeout=HANG_TIMEOUT))
    with pytest.MonkeyPatch.context() as patch, running_server(app) as address:
        patch.setattr(
            "llm2clip.search.query.UNCENTRED_COPY_SIMILARITY", 1.1
        )  # a random model may consider any images similar
        yield address


@pytest.fixture
def ready() -> str:
    return "document.activeElement.id === 'text'"  # autofocus may follow the load event


def wait_for_hits(page: Any, count: int = 36) -> Any:
    """Wait until no search is in progress and there are this many results, and return the results.

    A search in progress would replace the results later, and close the detail view.
    """
    is_idle = "!document.body.classList.contains('searching')"
    wait_until(page, f"{is_idle} && document.querySelectorAll('#grid .tile').length === {count}")
    return page.locator("#grid .tile")


def wait_for_opened_image(page: Any) -> None:
    """Wait until a page that a link opened shows an image.

    A wait that begins in the empty document before the image's may never end.
    """
    page.wait_for_url("**/image/**")
    wait_until(page, "document.images[0]?.naturalWidth === 48")


def search_for(page: Any, text: str, count: int = 36) -> Any:
    """Search for a text, wait for the results, and return them."""
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")
    return wait_for_hits(page, count)


@on_both_devices
def test_text_search_detail_view_and_more_like_this(page: Any) -> None:
    assert page.locator("#start").is_visible()
    page.keyboard.type("a red one,")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("in the middle")
    page.keyboard.press("Enter")
    assert wait_for_hits(page).first.is_visible() and not page.locator("#start").is_visible()
    status = page.locator("#status").inner_text()
    assert "36 images" in status and status.endswith("perhaps none of them is close to the query"), "not calibrated"
    scores = [float(text) for text in page.locator("#grid .score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page must not scroll horizontally"
    page.locator("#grid button").nth(1).click()
    assert page.locator("#detail").is_visible()
    name = page.locator("#locations span").first.inner_text()
    wait_until(page, "document.getElementById('large').naturalWidth === 48")
    page.keyboard.press("ArrowRight")
    assert page.locator("#locations span").first.inner_text() != name
    page.keyboard.press("ArrowLeft")
    page.locator("#like").click()
    wait_until(page, "document.querySelector('#grid .score').textContent === '1.000'")
    assert not page.locator("#detail").is_visible() and page.locator(".chip").count() == 1
    assert page.locator("#grid .name").first.text_content() == name.rsplit("/", 1)[-1]
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
    search_for(page, "a red one")
    names = page.locator("#grid .name").all_text_contents()
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


@on_both_devices
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


def test_tab_key_leaves_the_results(page: Any) -> None:
    """Otherwise, keyboard users could not reach the buttons behind thousands of results."""
    search_for(page, "blue").nth(3).locator("button").focus()
    page.keyboard.press("x")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "selection-like"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("[...document.querySelectorAll('#grid button')].indexOf(document.activeElement)") == 3
    page.locator("#selection-clear").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("[...document.querySelectorAll('#grid button')].indexOf(document.activeElement)") == 3


def test_closing_the_detail_view_keeps_the_focus_in_the_search_box(page: Any) -> None:
    search_for(page, "blue").first.locator("button").click()
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
    assert page.locator("#grid .name").first.text_content() == "4.png"
    drop_file = """async (url) => {
        const blob = await (await fetch(url)).blob(), data = new DataTransfer();
        data.items.add(new File([blob], 'x.png', {type: 'image/png'}));
        dispatchEvent(new DragEvent('dragenter', {dataTransfer: data, bubbles: true}));
        const shown = !document.getElementById('drop').hidden;
        dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true}));
        return shown && document.getElementById('drop').hidden;
    }"""
    page.locator(".chip").click()
    wait_until(page, "document.querySelectorAll('#grid .tile').length === 0")
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
    assert wait_for_hits(page, 1).locator(".name").text_content() == "12.png"
    page.context.set_offline(True)
    page.locator("#text").press("Enter")
    wait_until(page, "document.getElementById('status').textContent.includes('is not responding')")
    page.context.set_offline(False)
    page.locator("#text").fill("")
    page.locator("#caption").fill("")
    page.locator("#text").press("Enter")
    assert "Enter a description" in page.locator("#status").inner_text() and page.locator("#start").is_visible()


def test_unreadable_uploads_are_removed_from_the_query(page: Any, image_folder: Path, tmp_path: Path) -> None:
    for name in ("bad.png", "photo.HEIC"):  # the type of the second file is unknown to browsers
        (tmp_path / name).write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not an image either")
    page.locator("#text").fill("red")
    files = [tmp_path / "bad.png", image_folder / "4.png", tmp_path / "photo.HEIC", tmp_path / "notes.txt"]
    page.locator("#file").set_input_files(files)
    wait_until(page, "document.getElementById('problem').textContent.split('\\n').length === 3")
    wait_for_hits(page)
    problem = page.locator("#problem").inner_text()
    for name in ("bad.png", "photo.HEIC", "notes.txt"):
        assert f"{name} was not added to the query: " in problem
    assert page.locator(".chip").count() == 1 and page.locator("#uploads").is_visible()
    page.locator("#text").press("Enter")
    wait_for_hits(page)
    assert page.locator("#problem").inner_text() == ""
    assert "Searching" not in page.locator("#status").inner_text() and page.locator("#status.error").count() == 0


def test_filters_work_without_a_query_and_are_part_of_the_address(page: Any, image_folder: Path) -> None:
    page.locator("#more").click()
    page.locator("#path").fill(f"{image_folder.name}/*.png")
    page.locator("#min_side").fill("30")
    page.locator("#after").fill("2001-02-03")
    page.locator("#path").press("Enter")
    wait_for_hits(page)
    assert "newest first" in page.locator("#status").inner_text() and not page.locator("#start").is_visible()
    assert not page.locator("#active").is_visible()
    page.locator("#more").click()
    assert page.locator("#active button").count() == 3
    page.locator("#grid button").first.click()
    assert page.locator("#where").is_disabled()
    page.keyboard.press("Escape")

    page.reload()
    wait_for_hits(page)
    chips = " ".join(page.locator("#active button").all_text_contents())
    assert "/*.png" in chips and "at least 30" in chips and "after 2001-02-03" in chips
    page.locator("#active button", has_text="shorter").click()
    wait_for_hits(page)
    assert page.locator("#active button").count() == 2 and page.locator("#min_side").input_value() == ""
    page.go_back()
    wait_until(page, "document.querySelectorAll('#active button').length === 3")

    page.goto(page.url.partition("#")[0] + "#without=a+red+one&unlike=3")
    wait_for_hits(page)
    assert "least similar" in page.locator("#status").inner_text()
    assert page.locator(".chip.negative").count() == 1 and page.locator("#active").inner_text() == "without a red one ✕"


def limit_pages(page: Any, top: int) -> list[dict[str, Any]]:
    """Limit the number of results per request. Return the list of search requests, which grows later."""
    requests: list[dict[str, Any]] = []

    def limit(route: Any) -> None:
        requests.append(route.request.post_data_json)
        route.continue_(post_data={**requests[-1], "top": top})

    page.route("**/search", limit)
    return requests


@on_both_devices
def test_results_load_when_the_page_is_scrolled_to_the_end(page: Any) -> None:
    page.set_viewport_size({"width": 380, "height": 120})  # results load 1,000 pixels before the end
    requests = limit_pages(page, 16)
    search_for(page, "seven", 16)  # no caption contains this word
    assert "16 of 36 images" in page.locator("#status").inner_text()
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_for_hits(page, 32)
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_for_hits(page)
    assert len(set(page.locator("#grid .name").all_text_contents())) == 36
    assert [request.get("offset", 0) for request in requests] == [0, 16, 32]
    assert not page.locator("#show-more").is_visible()
    scores = [float(text) for text in page.locator("#grid .score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    page.set_viewport_size({"width": 380, "height": 700})
    page.locator("#grid button").nth(25).click()
    name = page.locator("#grid .name").nth(25).text_content()
    assert page.locator("#locations span").first.inner_text().endswith(name)


def test_thumbnails_load_when_they_come_near_the_window(page: Any) -> None:
    page.set_viewport_size({"width": 380, "height": 120})  # thumbnails load 1,000 pixels before they are visible
    search_for(page, "seven")
    last = "document.querySelectorAll('#grid img')[35]"
    wait_until(page, "document.querySelector('#grid img').naturalWidth === 48")
    assert page.evaluate(f"{last}.getAttribute('src')") is None
    page.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    wait_until(page, f"{last}.naturalWidth === 48")


def test_results_that_fail_to_load_can_be_loaded_with_the_button(page: Any) -> None:
    failures = [True]

    def fail_once(route: Any) -> None:
        if route.request.post_data_json.get("offset") and failures:
            failures.pop()
            route.fulfill(status=503, json={"error": {"message": "try again"}})
        else:
            route.continue_(post_data={**route.request.post_data_json, "top": 20})

    page.route("**/search", fail_once)
    search_for(page, "seven", 20)
    wait_until(page, "document.querySelector('#status.error')?.textContent === 'try again'")
    page.locator("#show-more").focus()
    page.keyboard.press("Enter")
    wait_for_hits(page)
    assert "36 images" in page.locator("#status").inner_text() and page.locator("#status.error").count() == 0
    assert page.evaluate("[...document.querySelectorAll('#grid button')].indexOf(document.activeElement)") == 20


def test_weak_hits_are_shown_on_request(
    browser: Any, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    index = make_index(tmp_path / "index", image_folder, dual_encoder)
    reject_all_texts(index, dual_encoder)
    with running_server(create_patient_app(dual_encoder, index)) as address:
        page = browser.new_page()
        page.goto(address)
        search_for(page, "unicorn", 0)
        assert page.locator("#status").inner_text() == "Nothing in the index is close to this query."
        assert not page.locator("#show-more").is_visible()
        page.locator("#text").fill("not searched yet")
        with page.expect_request("**/search") as request:
            page.get_by_role("button", name="Show the closest images anyway").click()
        assert request.value.post_data_json["texts"] == ["unicorn"], "the last search is repeated"
        wait_for_hits(page)
        assert "36 images, none of them close to the query" in page.locator("#status").inner_text()
        assert not page.locator("#show-weak").is_visible()
        search_for(page, "dragon", 0)  # a new search hides weak hits again
        page.locator("#show-weak").click()
        wait_for_hits(page).first.locator("button").click()
        assert "0% likely to match" in page.locator("#facts").inner_text()
        page.locator("#like").click()
        wait_until(page, "document.querySelector('#status').textContent.startsWith('36 images, most similar first')")
        page.close()


def test_similar_images_are_one_result_that_links_to_them(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's model considers all images similar if the threshold is low."""
    monkeypatch.setattr("llm2clip.search.query.UNCENTRED_COPY_SIMILARITY", -1.0)
    search_for(page, "seven", 1)
    assert page.locator("#grid .note").text_content() == "+35 similar"
    assert page.locator("#status").inner_text().startswith("36 images")
    page.locator("#grid button").click()
    assert page.locator("#similar a").count() == 35 and page.locator("#similar-title").inner_text() == "+35 similar"
    with page.expect_popup() as popup:
        page.locator("#similar a").first.click()
    wait_for_opened_image(popup.value)
    popup.value.close()
    page.keyboard.press("Escape")
    page.locator("#more").click()
    page.locator("#group").select_option("off")
    page.locator("#text").press("Enter")
    wait_for_hits(page)
    assert "group=off" in page.url and page.locator("#grid .note").count() == 0
    page.locator("#grid button").first.click()
    assert not page.locator("#similar-title").is_visible() and not page.locator("#similar").is_visible()


def test_words_of_the_query_are_shaded_by_their_effect(page: Any) -> None:
    search_for(page, "a 🚀 red, one").first.locator("button").click()
    with page.expect_response("**/explain") as response:
        page.locator("#why").click()
    page.locator("#explanation ruby").first.wait_for()
    words = response.value.json()["words"]
    assert [word["text"] for word in words] == page.locator("#explanation ruby").evaluate_all(
        "(words) => words.map((word) => word.firstChild.textContent)"
    )
    text = page.locator("#explanation p").evaluate(
        "(line) => [...line.childNodes].map((node) => (node.matches ? node.firstChild : node).textContent).join('')"
    )
    assert text == "a 🚀 red, one"
    effects = [float(text.replace("−", "-")) for text in page.locator("#explanation rt").all_text_contents()]
    assert effects == pytest.approx([word["effect"] for word in words], abs=6e-4)
    classes = page.locator("#explanation ruby").evaluate_all("(words) => words.map((word) => word.className)")
    assert classes == ["lower" if word["effect"] < 0 else "raise" for word in words]
    page.keyboard.press("ArrowRight")
    assert page.locator("#explanation ruby").count() == 0 and page.locator("#explanation-status").inner_text() == ""
    page.keyboard.press("y")
    page.locator("#explanation ruby").first.wait_for()
    page.keyboard.press("y")
    assert page.locator("#explanation ruby").count() == 0
    page.route("**/explain", lambda route: route.fulfill(status=404, json={"error": {"message": "it is gone"}}))
    page.locator("#why").click()
    wait_until(page, "document.querySelector('#explanation-status.error')?.textContent === 'it is gone'")
    page.locator("#like").click()
    wait_until(page, "document.querySelectorAll('.chip').length === 1")
    wait_for_hits(page).first.locator("button").click()
    assert page.locator("#why").is_disabled(), "the query has no words"


# ---- selection ------------------------------------------------------------------------------------------------------


def get_selected(page: Any) -> list[int]:
    """Return the positions of the selected results, and check that their checkboxes are checked."""
    marked: list[list[int]] = page.evaluate("""() => {
        const tiles = [...document.querySelectorAll('#grid .tile')].map((tile, index) => [tile, index]);
        const list = (test) => tiles.filter(([tile]) => test(tile)).map(([, index]) => index);
        return [list((tile) => tile.matches('.selected')), list((tile) => tile.querySelector('input').checked)];
    }""")
    assert marked[0] == marked[1]
    return marked[0]


def test_results_are_selected_with_the_keyboard(page: Any) -> None:
    search_for(page, "seven")
    page.keyboard.press("ArrowDown")
    assert not page.locator("#selection").is_visible()
    page.keyboard.press("x")
    assert page.locator("#selection-count").inner_text() == "1 image selected"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert get_selected(page) == [0, 2] and not page.locator("#detail").is_visible()
    page.keyboard.press("Space")
    assert get_selected(page) == [0]
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+X")
    assert get_selected(page) == [0, 2, 3, 4]
    page.keyboard.press("Shift+ArrowRight")
    assert get_selected(page) == [0, 2, 3, 4, 5]
    page.keyboard.press("Enter")
    assert page.locator("#select").get_attribute("aria-pressed") == "true"
    page.keyboard.press("x")
    page.keyboard.press("ArrowRight")
    assert page.locator("#select").get_attribute("aria-pressed") == "false"
    page.locator("#select").click()
    page.keyboard.press("Escape")
    page.locator("#detail").wait_for(state="hidden")
    assert get_selected(page) == [0, 2, 3, 4, 6]
    page.keyboard.press("Escape")
    assert get_selected(page) == [] and not page.locator("#selection").is_visible()


def test_results_are_selected_with_the_mouse(page: Any) -> None:
    search_for(page, "seven")
    tiles = page.locator("#grid .tile")
    tiles.nth(1).hover()
    assert tiles.nth(1).locator(".mark").evaluate("(mark) => getComputedStyle(mark).opacity") == "1"
    assert tiles.nth(3).locator(".mark").evaluate("(mark) => getComputedStyle(mark).opacity") == "0"
    tiles.nth(1).locator(".mark").click()
    tiles.nth(4).locator(".mark").click(modifiers=["Shift"])
    tiles.nth(8).locator("button").click(modifiers=["Control"])
    assert get_selected(page) == [1, 2, 3, 4, 8] and not page.locator("#detail").is_visible()
    tiles.nth(2).locator(".mark").click()
    search_for(page, "eight")
    assert page.locator("#selection-count").inner_text() == "4 images selected", "a search keeps the selection"
    assert len(get_selected(page)) == 4
    page.locator("#selection-clear").click()
    assert get_selected(page) == []


def test_rubber_band_selects_the_results_that_it_touches(page: Any) -> None:
    search_for(page, "seven")
    boxes = [page.locator("#grid .tile").nth(n).bounding_box() for n in range(14)]
    columns = sum(box["y"] == boxes[0]["y"] for box in boxes)
    first, last = boxes[1], boxes[columns + 2]
    page.locator("#grid .tile").nth(columns + 1).locator(".mark").click()
    page.locator("#grid .tile").nth(0).locator(".mark").click()
    page.mouse.move(first["x"] + first["width"] / 2, first["y"] + first["height"] / 2)
    page.mouse.down()
    page.mouse.move(last["x"] + 2 * last["width"], last["y"] + last["height"] / 2)
    assert page.locator("#band").is_visible()
    page.mouse.move(last["x"] + last["width"] / 2, last["y"] + last["height"] / 2, steps=3)
    page.mouse.up()
    assert get_selected(page) == [0, 1, 2, columns + 1, columns + 2]
    assert not page.locator("#band").is_visible() and not page.locator("#detail").is_visible()
    page.locator("#grid button").first.click()
    assert page.locator("#detail").is_visible(), "a click without movement opens the image"


def test_marked_images_are_searched_for_and_stay_in_the_address(page: Any) -> None:
    search_for(page, "seven")
    for n in (3, 5):
        page.locator("#grid .tile").nth(n).locator(".mark").click()
    names = set(page.locator("#grid .selected .name").all_text_contents())
    page.locator("#selection-like").click()
    wait_until(page, "document.querySelectorAll('.chip').length === 2")
    wait_for_hits(page)
    assert set(page.locator("#grid .name").all_text_contents()[:2]) == names
    assert not page.locator("#selection").is_visible() and "like=" in page.url
    page.reload()
    wait_until(page, "document.querySelectorAll('.chip').length === 2")
    wait_for_hits(page)
    page.locator("#grid .tile").nth(0).locator(".mark").click()
    page.locator("#selection-unlike").click()
    wait_until(page, "document.querySelectorAll('.chip.negative').length === 1")
    wait_for_hits(page)
    page.locator("#grid .tile").nth(0).locator(".mark").click()
    page.locator("#grid .tile").nth(16).locator(".mark").click(modifiers=["Shift"])
    assert page.locator("#selection-like").is_disabled() and page.locator("#selection-unlike").is_disabled()
    negative = page.evaluate("hits.findIndex((hit) => hit.id === query.negativeLike[0])")
    page.locator("#grid .tile").nth(min(negative, 16)).locator(".mark").click()  # the others are not in the query yet
    page.locator("#selection-unlike").click()
    assert "at most 16 images" in page.locator("#problem").inner_text(), "one image is already in the query"
    assert len(get_selected(page)) == 16


def test_selected_images_are_exported_and_downloaded(page: Any, image_folder: Path, tmp_path: Path) -> None:
    search_for(page, "seven")
    names = page.locator("#grid .name").all_text_contents()[:2]
    for n in range(2):
        page.locator("#grid .tile").nth(n).locator(".mark").click()
    with page.expect_download() as download:
        page.locator("#selection-export").click()
    assert download.value.suggested_filename == "images.csv"
    with Path(download.value.path()).open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == [str(image_folder / name) for name in names]
    assert all(" on grey" in row["captions"] and row["id"].isdigit() for row in rows)
    downloads: list[Any] = []
    page.on("download", lambda file: downloads.append(file))
    with page.expect_event("download", lambda _: len(downloads) == 2):
        page.locator("#selection-download").click()
    for name, file in zip(names, sorted(downloads, key=lambda file: names.index(file.suggested_filename)), strict=True):
        assert Path(file.path()).read_bytes() == (image_folder / name).read_bytes()


def test_exported_cells_are_never_formulas(page: Any) -> None:
    cells = page.evaluate("""() => makeCsv([{id: '7', width: 5, images: [
        {name: '/a "quoted", name.jpg', captions: ['=HYPERLINK("x")', 'two'], camera: '+1', latitude: -1.5},
        {name: '-b', captions: [], camera: '', latitude: null}]}])""")
    rows = list(csv.reader(cells.removeprefix("\ufeff").splitlines(keepends=True)))
    assert rows == [
        ["id", "name", "captions", "camera", "latitude", "width"],
        ["7", '/a "quoted", name.jpg', '\'=HYPERLINK("x")\ntwo', "'+1", "-1.5", "5"],
        ["7", "'-b", "", "", "", "5"],
    ]


# ---- first screen ---------------------------------------------------------------------------------------------------


def test_first_screen_links_to_example_queries_and_the_newest_images(page: Any) -> None:
    page.locator("#queries a").first.wait_for()
    assert page.locator("#queries a").count() == 6 and page.locator("#newest a").count() == 12
    text = page.locator("#queries a").first.inner_text()
    page.locator("#queries a").first.click()
    wait_for_hits(page)
    assert page.locator("#text").input_value() == text and not page.locator("#start").is_visible()
    page.go_back()
    page.locator("#newest a").first.click()
    wait_until(page, "document.querySelector('#grid .score')?.textContent === '1.000'")
    assert page.locator(".chip").count() == 1


def test_searches_are_saved_in_the_browser(page: Any) -> None:
    dialogs: list[str] = []

    def answer(name: str | None) -> None:
        def handle(dialog: Any) -> None:
            dialogs.append(dialog.default_value)
            dialog.accept(name) if name else dialog.dismiss()

        page.once("dialog", handle)
        page.locator("#save").click()

    assert not page.locator("#save").is_visible() and not page.locator("#saved-searches").is_visible()
    page.locator("#more").click()
    page.locator("#min_side").fill("30")
    search_for(page, "seven & eight")
    answer("large numbers")
    assert "Saved" in page.locator("#status").inner_text()
    search_for(page, "nine")
    answer(None)
    answer("<b>nine</b>")
    assert dialogs == ["seven & eight, shorter side at least 30"] + 2 * ["nine, shorter side at least 30"]
    page.goto(page.url.partition("#")[0])
    page.reload()
    assert page.locator("#saved a").all_text_contents() == ["<b>nine</b>", "large numbers"]
    page.locator("#saved a").nth(1).click()
    wait_for_hits(page)
    assert page.locator("#text").input_value() == "seven & eight" and page.locator("#min_side").input_value() == "30"
    page.go_back()
    page.get_by_role("button", name="Delete saved search large numbers").click()
    assert page.locator("#saved a").all_text_contents() == ["<b>nine</b>"]
    page.reload()
    assert page.locator("#saved a").all_text_contents() == ["<b>nine</b>"]


def test_search_with_added_images_cannot_be_saved(page: Any, image_folder: Path) -> None:
    page.locator("#text").fill("seven")
    page.locator("#file").set_input_files(image_folder / "4.png")
    wait_for_hits(page)
    assert not page.locator("#save").is_visible()


# ---- accessibility and touch ----------------------------------------------------------------------------------------


def find_violations(page: Any) -> list[str]:
    """Return the violations of accessibility rules that axe-core finds in the page."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page).response
    assert results["passes"]
    return [
        f"{violation['id']}: {node['html'][:120]} {node['any'][:1]}"
        for violation in results["violations"]
        for node in violation["nodes"]
    ]


@on_both_devices
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.locator("#queries a").first.wait_for()
    page.evaluate('localStorage.setItem(\'llm2clip-saved-searches\', \'[{"name": "a", "hash": "q=a"}]\')')
    page.reload()
    page.locator("#saved a").wait_for()
    page.locator("#queries a").first.wait_for()
    assert find_violations(page) == []
    page.locator("#text").fill("grey")
    page.locator("#more").click()
    page.locator("#caption").fill("left")
    page.locator("#text").press("Enter")
    wait_for_hits(page, 6)
    assert find_violations(page) == [], "results with open filters"
    page.locator("#more").click()
    page.locator("#grid .tile").nth(1).locator(".mark").click()
    page.locator("#selection-unlike").click()
    wait_for_hits(page, 6)
    page.locator("#grid .tile").nth(2).locator(".mark").click()
    assert find_violations(page) == [], "results with a negative image, active filters and a selection"
    page.locator("#grid button").first.click()
    wait_until(page, "document.getElementById('large').naturalWidth === 48")
    page.locator("#where").click()
    page.locator("#heatmap").wait_for()
    page.locator("#why").click()
    page.locator("#explanation ruby").first.wait_for()
    assert find_violations(page) == [], "detail view"


@pytest.mark.parametrize("page", ["phone"], indirect=True)
def test_swiping_shows_the_next_and_previous_image(page: Any) -> None:
    search_for(page, "seven").nth(1).locator("button").tap()
    session = page.context.new_cdp_session(page)

    def swipe(right: int, down: int) -> str:
        wait_until(page, "document.getElementById('large').naturalWidth === 48")
        box = page.locator("#picture").bounding_box()
        touch = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [touch]})
        for step in range(1, 5):
            moved = {"x": touch["x"] + right * step / 4, "y": touch["y"] + down * step / 4}
            session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [moved]})
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        return Path(page.locator("#locations span").first.inner_text()).name

    names = page.locator("#grid .name").all_text_contents()
    assert swipe(-120, 10) == names[2]
    assert swipe(120, -10) == names[1]
    assert swipe(-30, 0) == swipe(20, 100) == names[1], "short and vertical movements do not count"
    assert swipe(150, 0) == names[0] and swipe(150, 0) == names[0]


# ---- detail view and token ------------------------------------------------------------------------------------------


def test_detail_view_offers_the_original(page: Any, image_folder: Path) -> None:
    """A second Enter closes the view and does not start another search."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    search_for(page, "red").first.locator("button").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "close"
    path = Path(page.locator("#locations span").first.inner_text())
    assert path.parent == image_folder
    page.locator("#locations button").first.click()
    wait_until(page, "document.querySelector('#locations button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == str(path)
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == path.name
    assert Path(download.value.path()).read_bytes() == path.read_bytes()
    with page.expect_popup() as popup:
        page.locator("#original").click()
    wait_for_opened_image(popup.value)
    popup.value.close()
    page.locator("#close").focus()
    page.keyboard.press("Enter")
    page.locator("#detail").wait_for(state="hidden")
    assert page.locator(".chip").count() == 0


@on_both_devices
def test_placeholders_are_readable_and_key_hints_are_hidden_on_touch_devices(page: Any) -> None:
    contrast = """(selector) => {
        const luminance = (color) => color.match(/\\d+/g).slice(0, 3).map((part) => part / 255)
            .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
            .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
        const element = document.querySelector(selector), box = element.closest('.box') || element;
        const colors = [getComputedStyle(element, '::placeholder').color, getComputedStyle(box).backgroundColor];
        const [dark, light] = colors.map(luminance).sort((a, b) => a - b);
        return (light + 0.05) / (dark + 0.05);
    }"""
    for selector in ("#text", "#negative"):
        assert page.evaluate(contrast, selector) >= 4.5
    is_touch = page.evaluate("matchMedia('(hover: none)').matches")
    assert page.locator(".keys").is_visible() == (not is_touch)


def test_page_without_a_token_asks_for_it(browser: Any, dual_encoder: DualEncoder) -> None:
    with running_server(create_app(dual_encoder, access=AccessPolicy(token="secret"))) as address:
        page = browser.new_page()
        page.goto(f"{address}#q=red")
        page.locator("input[name=token]").fill("wrong")
        page.keyboard.press("Enter")
        wait_until(page, "location.search === '?token=wrong'")
        page.locator("input[name=token]").fill("secret")
        page.keyboard.press("Enter")
        wait_until(page, "document.getElementById('text')?.value === 'red'")
        assert page.url == f"{address}#q=red"
        page.close()
