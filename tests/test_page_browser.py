"""The page of `partition report` in a real browser: it opens without a network, turns, follows and filters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import partitioner as pt
from tests.test_page import HOSTILE, network

pytestmark = pytest.mark.browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="install playwright: make test-browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail(f"no browser found ({', '.join(BROWSERS)}); install one, e.g. apt-get install chromium")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    plans = {
        "volume": pt.partition(network(3, (1, 1, 41, 38, 29)), mesh="depth=2,height=2"),
        "flat": pt.partition(network(3, (1, 1, 41, 38)), mesh="height=3,width=2"),
        "line": pt.partition(network(2, (2, 1, 41)), mesh="batch=2,width=3"),
        "single": pt.partition(network(2)),
        "many": pt.partition(network(3, (1, 1, 64, 64, 64)), mesh="depth=16,height=16,width=16"),
        "hostile": pt.partition(network(prefix=HOSTILE), mesh="depth=2"),
    }
    for name, plan in plans.items():
        plan.report_html(folder / f"{name}.html", HOSTILE if name == "hostile" else name,
                         [{"mesh": "depth=4", "seconds": 1.5, "peak_bytes": 2**20, "note": HOSTILE}], "Why:\n\nso.")
    return {name: folder / f"{name}.html" for name in plans}


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(10_000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())
        self.settle()

    def settle(self) -> None:
        """Two frames, so that what was asked for has been drawn."""
        self.page.evaluate("() => new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def drawing(self) -> str:
        self.settle()
        return self.page.evaluate("() => document.getElementById('volume').toDataURL()")

    def painted(self) -> int:
        """Pixels of the drawing that are not empty."""
        self.settle()
        return self.page.evaluate("""() => { const c = document.getElementById('volume');
            const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let n = 0; for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n; }""")


@pytest.fixture
def open_page(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    opened: list[Opened] = []

    def act(name: str, **options: Any) -> Opened:
        opened.append(Opened(browser, pages[name], **options))
        return opened[-1]

    yield act
    for one in opened:
        assert one.said == []
        assert [url for url in one.asked if not url.startswith(("file:", "data:"))] == []
        assert sum(url.startswith("file:") for url in one.asked) == 1
        one.page.close()


@pytest.mark.parametrize("name", ["volume", "flat", "line", "single", "many"])
def test_it_opens_and_draws(open_page: Any, name: str) -> None:
    opened = open_page(name)
    assert opened.page.locator("h1").inner_text() == name
    assert opened.painted() > 2000
    assert opened.page.locator("#rows tr").count() > 2
    assert opened.page.locator("#memory svg path").count() >= 2
    assert opened.page.locator("#alternatives tbody tr").count() == 1


def test_names_stay_names(open_page: Any) -> None:
    opened = open_page("hostile")
    assert opened.page.locator("h1").inner_text() == HOSTILE
    assert opened.page.locator("img").count() == 0 and opened.page.locator("script").count() == 2
    for row in range(opened.page.locator("#rows tr").count()):
        opened.page.evaluate("row => document.querySelectorAll('#rows tr')[row].click()", row)
    opened.page.locator("#memory svg").hover()
    assert opened.page.locator("img").count() == 0


def test_it_turns_by_mouse_and_keys(open_page: Any) -> None:
    opened = open_page("volume")
    pictures = [opened.drawing()]
    frame = opened.page.locator("#volume").bounding_box()
    x, y = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    opened.page.mouse.move(x, y)
    opened.page.mouse.down()
    opened.page.mouse.move(x + 80, y + 20)
    opened.page.mouse.up()
    pictures.append(opened.drawing())
    opened.page.locator("#volume").focus()
    for key in ("ArrowLeft", "ArrowUp", "+", "]"):
        opened.page.keyboard.press(key)
        pictures.append(opened.drawing())
    assert len(set(pictures)) == len(pictures)


def test_a_click_chooses_a_shard(open_page: Any) -> None:
    opened = open_page("flat")
    frame = opened.page.locator("#volume").bounding_box()
    found = set()
    for across in (0.4, 0.6):
        for down in (0.25, 0.5, 0.75):
            opened.page.mouse.click(frame["x"] + across * frame["width"], frame["y"] + down * frame["height"])
            opened.settle()
            found.add(opened.page.locator("#rank").input_value())
    assert found == set("012345")


def test_choosing_a_node_changes_the_drawing(open_page: Any) -> None:
    opened = open_page("volume")
    before = opened.drawing()
    opened.page.locator("#rows tr", has_text="conv1").last.click()
    assert opened.drawing() != before
    assert "conv1" in opened.page.locator("#node h3").inner_text()
    assert "conv1" in opened.page.locator("#step-text").inner_text()
    opened.page.keyboard.press("Tab")
    opened.page.locator("#rows tr[aria-current] button").focus()
    opened.page.keyboard.press("ArrowDown")
    assert "conv1" not in opened.page.locator("#rows tr[aria-current] td.name").inner_text()


def test_the_filter(open_page: Any) -> None:
    opened = open_page("volume")
    visible = opened.page.locator("#rows tr:not([hidden])")
    everything = visible.count()
    opened.page.locator("#filter").fill("conv2")
    assert 0 < visible.count() < everything
    opened.page.locator("#filter").fill("no such node")
    assert visible.count() == 0 and opened.page.locator("#nothing").is_visible()
    opened.page.locator("#filter").fill("")
    opened.page.get_by_role("button", name="Communication").click()
    assert visible.count() == 3
    assert "3 of" in opened.page.locator("#count").inner_text()


def test_memory_follows_rank_and_step(open_page: Any) -> None:
    opened = open_page("volume")
    curve = opened.page.locator("#memory path.curve")
    before = curve.get_attribute("d")
    chosen = opened.page.locator("#memory-rank").input_value()
    assert "largest" in opened.page.locator("#memory-rank option:checked").inner_text()
    opened.page.locator("#memory-rank").select_option(str(3 - int(chosen)))
    assert curve.get_attribute("d") != before
    assert opened.page.locator("#rank").input_value() == str(3 - int(chosen))
    opened.page.locator("#step").press("End")
    assert "Step 6 of 6" in opened.page.locator("#step-text").inner_text()
    opened.page.locator("#memory svg").hover()
    assert "B" in opened.page.locator(".tip").inner_text()


@pytest.mark.parametrize("name", ["volume", "flat", "many", "hostile"])
def test_a_narrow_window_does_not_scroll_sideways(open_page: Any, name: str) -> None:
    opened = open_page(name, width=360)
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= 360
    assert opened.painted() > 2000


def test_light_and_dark(open_page: Any) -> None:
    def shade(opened: Opened) -> int:
        return int(opened.page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))

    dark = open_page("volume", scheme="dark")
    assert shade(dark) < 60 < 200 < shade(open_page("volume"))
    before = dark.drawing()
    dark.page.locator("#theme").click()  # light, whatever the system has
    assert shade(dark) > 200 and dark.drawing() != before


def test_controls_have_names(open_page: Any) -> None:
    opened = open_page("volume")
    nameless = opened.page.evaluate("""() => [...document.querySelectorAll('button, input, select, canvas')].filter(e =>
        !(e.textContent.trim() || e.getAttribute('aria-label') || [...e.labels || []].some(l => l.textContent.trim())))
        .map(e => e.outerHTML)""")
    assert nameless == []


def test_4096_ranks_are_drawn_at_once(open_page: Any) -> None:
    opened = open_page("many")
    seconds = opened.page.evaluate("""() => new Promise(done => { const began = performance.now(); let n = 0;
        const drawing = document.getElementById('volume');
        const step = () => { drawing.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}));
            if (++n < 10) requestAnimationFrame(step); else done((performance.now() - began) / 1000); }; step(); })""")
    assert seconds < 3
