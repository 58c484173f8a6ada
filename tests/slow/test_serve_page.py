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
expect.set_options(timeout=60_000)
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


@pytest.fixture(params=("light", "dark", "narrow"))
def page(request, browser, server):
    narrow = request.param == "narrow"
    context = browser.new_context(
        color_scheme="light" if narrow else request.param,
        viewport={"width": 390, "height": 844} if narrow else {"width": 1100, "height": 760},
    )
    page = context.new_page()
    page.faults, page.asked = [], []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.faults.append(line.text))
    page.on("request", lambda sent: sent.method == "POST" and page.asked.append(sent.post_data_json))
    page.goto(server.url)
    expect(page.locator("#model")).to_have_text(re.compile("^target"))
    yield page
    folder = os.environ.get("SERVE_SCREENSHOTS")
    if folder:
        name = f"{request.node.name.replace('[', '-').rstrip(']')}.png"
        page.screenshot(path=str(Path(folder) / name), full_page=narrow)
    assert page.faults == []
    context.close()


def ask(page, text: str) -> None:
    """By keyboard; waits for the end."""
    page.locator("#prompt").press_sequentially(text)
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(re.compile("^Done"))


def test_a_chat_by_keyboard(page) -> None:
    """Focus starts in the prompt; the answer has both colours, the figures are the server's."""
    page.locator("#length").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("#temperature").focus()
    for _ in range(2):
        page.keyboard.press("ArrowLeft")
    page.locator("#tokens").fill("60")
    page.locator("#prompt").focus()
    ask(page, "How many apples?")
    assert (
        page.locator("#length-shown").inner_text() == "3" and page.locator("#temperature-shown").inner_text() == "0.8"
    )
    [body] = page.asked
    assert (body["draft_length"], body["temperature"], body["max_completion_tokens"]) == (3, 0.8, 60)
    assert body["messages"] == [{"role": "user", "content": "How many apples?"}]
    answer = page.locator(".message.assistant")
    assert answer.locator(".draft").count() > 0 and answer.locator(".target").count() > 0
    colours = {
        page.locator(f".message .{who}").first.evaluate("e => getComputedStyle(e).color") for who in ("draft", "target")
    }
    assert len(colours) == 2
    assert float(page.locator("#rate").inner_text()) > 0
    assert re.fullmatch(r"\d+ % of \d+", page.locator("#accepted").inner_text())
    assert float(page.locator("#per-step").inner_text()) > 2 and page.locator("#positions li").count() == 3
    assert re.match(r"Accepted at position 1: \d+ of \d+", page.locator("meter").first.get_attribute("aria-label"))
    assert page.evaluate("document.activeElement.id") == "prompt"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_plain_answers_have_no_drafts(page) -> None:
    page.locator("#speculative").focus()
    page.keyboard.press("Space")
    assert page.locator("#length-shown").inner_text() == "plain" and page.locator("#length").is_disabled()
    page.locator("#tokens").fill("30")
    page.locator("#prompt").focus()
    ask(page, "Again")
    assert page.locator(".message .draft").count() == 0 and page.locator(".message .target").count() == 1
    assert page.locator("#accepted").inner_text() == "no drafts"
    assert page.asked[-1]["draft_length"] == 0


def begin(page, text: str) -> None:
    """A long answer, drafted for; returns when some of it is there."""
    page.locator("#tokens").fill("450")
    page.locator("#prompt").focus()
    page.locator("#prompt").press_sequentially(text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant span")


def test_figures_come_with_the_tokens_and_are_those_of_this_answer(page) -> None:
    """While it is written, not only at its end; what the last answer left is gone when the next begins."""
    page.locator("#length").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("#tokens").fill("60")
    page.locator("#prompt").focus()
    ask(page, "One")
    page.evaluate(
        """() => {
            const shown = id => document.getElementById(id).textContent;
            window.live = [];
            new MutationObserver(() => window.live.push({
                writing: !document.getElementById("stop").disabled, accepted: shown("accepted"),
                steps: shown("per-step"), bars: document.querySelectorAll("#positions li").length,
            })).observe(document.getElementById("accepted"), { childList: true });
        }"""
    )
    ask(page, "Two")
    first, *live = page.evaluate("window.live")
    assert first == {"writing": True, "accepted": "–", "steps": "–", "bars": 0}
    counts = [int(shown["accepted"].split()[-1]) for shown in live if shown["bars"] == 0]
    assert len(set(counts)) > 3 and counts == sorted(counts) and all(shown["writing"] for shown in live)
    assert live[-1]["accepted"] == page.locator("#accepted").inner_text()
    assert live[-2]["accepted"] == live[-1]["accepted"]  # the last of the running figures are the server's final ones


def test_a_new_chat_begins_with_nothing_while_an_answer_is_written_too(page) -> None:
    begin(page, "The old chat")
    page.locator("#clear").focus()
    page.keyboard.press("Enter")
    page.locator("#tokens").fill("5")
    page.locator("#prompt").focus()
    ask(page, "The new one")
    assert page.asked[-1]["messages"] == [{"role": "user", "content": "The new one"}]
    assert page.locator(".message").count() == 2
    ask(page, "And again")
    assert [m["role"] for m in page.asked[-1]["messages"]] == ["user", "assistant", "user"]


def test_escape_stops_an_answer_and_the_server_lets_go(page, server) -> None:
    begin(page, "Tell me more")
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
    page.locator("#length").focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.locator("#prompt").focus()
    ask(page, "five tokens of one step have no rate")
    assert page.locator("#per-step").inner_text() == "5.00" and page.locator("#rate").inner_text() == "–"
