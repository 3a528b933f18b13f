"""The page at / in a real browser, with the real server behind it."""

import base64
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from internvl_rt.server.options import ServerOptions
from support.serving import KEY, SAMPLES, Running, running, scripted

pytestmark = pytest.mark.browser
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ServerOptions(port=0, default_max_tokens=64)) as made:
        yield made


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Browser, server: Running) -> Iterator[Page]:
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 860})
    opened, said = context.new_page(), list[str]()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.goto(server.url)
    opened.get_by_text("CPU").wait_for()
    yield opened
    assert said == []
    context.close()


def drop(page: Page, name: str) -> None:
    """Drops a sample picture onto the page."""
    data = base64.b64encode((SAMPLES / name).read_bytes()).decode()
    transfer = page.evaluate_handle(
        """([name, data]) => {
            const made = new DataTransfer();
            made.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, {type: "image/png"}));
            return made;
        }""",
        [name, data],
    )
    for event in ("dragover", "drop"):
        page.dispatch_event("#conversation", event, {"dataTransfer": transfer})


def ask(page: Page, text: str) -> str:
    turns = page.locator("#turns > .turn")
    num_turns, box = turns.count(), page.get_by_role("textbox", name="Question")
    box.fill(text)
    box.press("Enter")
    expect(turns).to_have_count(num_turns + 1)
    expect(turns.last).to_have_attribute("data-state", "finished", timeout=30_000)
    return page.locator(".answer .words > .text").last.text_content()


def test_a_dropped_picture_is_cut_asked_about_and_answered(page: Page, tmp_path: Path) -> None:
    drop(page, "4719.png")
    page.get_by_text("4 \u00d7 1 tiles + thumbnail").wait_for()
    assert page.locator(".picture .grid i").count() == 4
    assert ask(page, "Read the digits.") == "4719"
    for figure in ("first", "speed", "total"):
        assert any(char.isdigit() for char in page.locator(f"[data-figure={figure}]").last.text_content())
    assert ask(page, "Once more, please."), "the conversation goes on"
    assert page.locator(".turn[data-state=finished]").count() == 2
    page.set_viewport_size({"width": 375, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    page.screenshot(path=tmp_path / "page.png")
    assert os.path.getsize(tmp_path / "page.png") > 10_000
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn[data-state=finished]")).to_have_count(0)
    drop(page, "42.png")
    assert ask(page, "Read the digits.") == "42"


def test_an_answer_can_be_stopped(page: Page, server: Running) -> None:
    with scripted(server, "word " * 1000, pause_s=0.01):
        box = page.get_by_role("textbox", name="Question")
        box.fill("Go on and on.")
        box.press("Enter")
        turn = page.locator("#turns > .turn").last
        expect(turn).to_contain_text("word word")
        box.press("Escape")
        expect(turn).to_have_attribute("data-state", "stopped", timeout=10_000)
        server.wait_until_idle()


def test_a_key_is_asked_for_and_used(browser: Browser) -> None:
    with running(ServerOptions(port=0, default_max_tokens=8), keys=(KEY,)) as closed:
        page = browser.new_page()
        page.goto(closed.url)
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use this key").click()
        page.get_by_text("CPU").wait_for()
        drop(page, "7.png")
        assert ask(page, "Read the digits.") == "7"
        page.close()
