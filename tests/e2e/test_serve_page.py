"""The page at / in a real browser: drop a picture, ask, see the stream, the cuts and the timings. No request leaves."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra llama3v[serve]")

from llama3v.engines.torch import TorchEngine
from llama3v.server.keys import Key, digest_of
from tests.serving import Running, png, running

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.slow,  # a browser: more than 20 seconds on a busy machine
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]

SCREENSHOTS = os.environ.get("LLAMA3V_SCREENSHOTS")
"""A folder to keep pictures of the page in, for people to look at."""


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> TorchEngine:
    return TorchEngine(tiny_model_dir, device="cpu", conversations=2)


@pytest.fixture(scope="module")
def server(engine: TorchEngine) -> Iterator[Running]:
    with running(engine) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


class Page:
    """The page, and everything that it asked for or complained about."""

    def __init__(self, browser, server: Running, **options) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", lambda said: self.complaints.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(server.address)
        self.page.locator("#model:not(:empty)").wait_for()

    def ask(self, question: str, picture: bytes | None = None) -> str:
        """Choose a picture, ask, and wait for the end of the answer."""
        if picture is not None:
            files = [{"name": "photo.png", "mimeType": "image/png", "buffer": picture}]
            self.page.set_input_files("#file", files)
            self.page.wait_for_selector("#waiting img")
        before = self.page.locator("article.assistant").count()
        self.page.fill("#question", question)
        self.page.press("#question", "Enter")
        answer = self.page.locator("article.assistant").nth(before)
        answer.locator("footer").wait_for(state="visible", timeout=60_000)
        return answer.locator(".said").inner_text()

    def screenshot(self, name: str) -> None:
        if SCREENSHOTS:
            self.page.wait_for_timeout(500)  # colours change slowly
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_a_picture_is_asked_about_twice_and_its_cuts_and_timings_are_shown(browser, server: Running) -> None:
    page = Page(browser, server, viewport={"width": 1200, "height": 800})
    page.screenshot("empty")
    first = page.ask("What is on the table?", png(1, (84, 42)))
    assert len(first) > 3
    assert page.page.locator("article.user .cuts i").count() == 2
    timings = page.page.locator("article.assistant .timings").first.inner_text()
    assert "3 tiles, 3 visual tokens" in timings
    assert "vision " in timings
    page.ask("And what else?")  # about the same picture: the conversation goes on
    assert page.page.locator("article").count() == 4
    page.screenshot("desktop")
    assert page.complaints == []
    assert all(url.startswith((server.address, "data:", "blob:")) for url in page.asked)


def test_the_curl_command_is_what_the_documents_say(browser, server: Running) -> None:
    page = Page(browser, server, permissions=["clipboard-read", "clipboard-write"])
    page.ask('It\'s 100% "quoted"?', png(2))
    page.page.locator("article.assistant .copy").click()
    command = page.page.evaluate("navigator.clipboard.readText()")
    assert command.startswith("printf '{")
    assert """It'\\''s 100%% \\\\"quoted\\\\"?""" in command
    assert """"$(base64 < 'photo.png' | tr -d '\\n')" |""" in command
    assert f"curl {server.address}/v1/chat/completions" in command


def test_it_works_by_keyboard_on_a_phone_and_in_the_dark(browser, server: Running) -> None:
    page = Page(browser, server, viewport={"width": 375, "height": 667}, color_scheme="dark", has_touch=True)
    page.ask("What is it?", png(3, (84, 84)))
    page.screenshot("phone-dark")
    wide = page.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not wide
    colour = page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert max(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 80
    page.page.click("#theme")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "light"
    page.screenshot("phone-light")
    reached = set()
    for _ in range(14):
        page.page.keyboard.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"question", "Picture", "Camera", "send", "reset", "theme", "Options"} <= reached


def test_what_the_model_says_is_text_and_an_error_is_shown(browser, server: Running) -> None:
    page = Page(browser, server)
    said = page.ask("<img src=x onerror=alert(1)>")
    assert page.page.locator("#talk img").count() == 0
    assert said is not None
    error = page.ask("a dog " * 400)
    assert "This model's context holds 512 tokens" in error
    page.screenshot("error")
    assert page.ask("Hello")  # and it goes on


def test_an_answer_is_stopped_by_escape(browser, server: Running, engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    original = engine._caches.read_part

    def slow(*arguments):
        time.sleep(0.1)
        return original(*arguments)

    monkeypatch.setattr(engine._caches, "read_part", slow)
    page = Page(browser, server)
    page.page.fill("#question", "Hello")
    page.page.press("#question", "Enter")
    page.page.wait_for_selector("#stop:not([hidden])")
    page.page.press("#question", "Escape")
    page.page.wait_for_selector("#stop", state="hidden")
    assert server.idle()


def test_the_page_asks_for_a_key_where_one_is_needed(browser, engine: TorchEngine) -> None:
    with running(engine, keys=[Key(name="shop", sha256=digest_of("secret"))]) as server:
        page = Page(browser, server)
        assert "needs an API key" in page.page.inner_text("#model")
        page.page.fill("#key", "secret")
        page.page.press("#key", "Tab")
        page.page.locator("#model", has_text="tiny").wait_for()
        assert len(page.ask("Hello")) > 0
