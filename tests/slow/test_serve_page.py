"""The page in a real headless Chromium: a chat by keyboard alone, colours, figures, both colour schemes."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import make_model
from tests.serve_process import ServerProcess

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect  # which asks from outside: the page's policy forbids evaluating strings in it
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium")]


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("page")
    target = make_model(folder / "target", tokenizer)
    # The draft is the target: at any temperature some tokens are its, and with three drafts a fourth is the target's.
    server = ServerProcess("--target", target, "--draft", target, "--dtype", "float32", "--backend", "torch")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=("light", "dark"))
def page(request, browser, server):
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1100, "height": 760})
    page = context.new_page()
    page.faults = []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.faults.append(line.text))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(re.compile("^target"))
    yield page
    folder = os.environ.get("SERVE_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{request.node.name.replace('[', '-').rstrip(']')}.png"))
    assert page.faults == []
    context.close()


def ask(page, text: str) -> None:
    """By keyboard; waits for the end."""
    page.locator("#prompt").press_sequentially(text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))


def test_a_chat_by_keyboard(page) -> None:
    """Focus starts in the prompt; the answer has both colours, the figures are the server's."""
    page.locator("#length").evaluate("slider => { slider.value = 3; slider.dispatchEvent(new Event('input')) }")
    page.locator("#tokens").fill("60")
    page.locator("#prompt").focus()
    ask(page, "How many apples?")
    answer = page.locator(".message.assistant")
    assert answer.locator(".draft").count() > 0 and answer.locator(".target").count() > 0
    colours = {
        page.locator(f".message .{who}").first.evaluate("e => getComputedStyle(e).color") for who in ("draft", "target")
    }
    assert len(colours) == 2
    assert float(page.locator("#rate").inner_text()) > 0
    assert re.fullmatch(r"\d+ % of \d+", page.locator("#accepted").inner_text())
    assert float(page.locator("#per-step").inner_text()) > 2 and page.locator("#positions li").count() == 3
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_plain_answers_have_no_drafts(page) -> None:
    page.locator("#speculative").focus()
    page.keyboard.press("Space")
    assert page.locator("#length-shown").inner_text() == "plain" and page.locator("#length").is_disabled()
    page.locator("#tokens").fill("30")
    page.locator("#prompt").focus()
    ask(page, "Again")
    assert page.locator(".message .draft").count() == 0 and page.locator(".message .target").count() == 1
    assert page.locator("#accepted").inner_text() == "no drafts"


def test_escape_stops_an_answer_and_the_server_lets_go(page, server) -> None:
    page.locator("#tokens").fill("450")
    page.locator("#prompt").focus()
    page.locator("#prompt").press_sequentially("Tell me more")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant span")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_enabled()
    server.settled("vllm:num_requests_running", 0)


def test_everything_can_be_reached_by_tab_and_has_a_name(page) -> None:
    names = []
    page.locator("#log").focus()
    for _ in range(12):
        names.append(
            page.evaluate(
                "() => { const e = document.activeElement;"
                " return e.getAttribute('aria-label') || e.labels?.[0]?.innerText || e.textContent }"
            )
        )
        page.keyboard.press("Tab")
    shown = " ".join(name.strip() for name in names)
    for name in ("Messages", "Message", "Send", "New chat", "Speculative", "Draft length", "Temperature", "API key"):
        assert name in shown, shown


def test_an_error_is_shown_and_the_chat_goes_on(page) -> None:
    page.locator("#tokens").fill("99999")
    page.locator("#prompt").focus()
    page.locator("#prompt").press_sequentially("x")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.error")
    assert "pass the context" in page.locator(".message.error").inner_text()
    page.faults.clear()  # the browser logs the 400 itself
    page.locator("#tokens").fill("5")
    page.locator("#prompt").focus()
    ask(page, "x")
    assert page.locator(".message.assistant").count() == 1
