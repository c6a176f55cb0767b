"""The chat page in Chromium: type, receive an answer and an image, ask for an edit, reload."""

import shutil

import pytest
from helpers import live_server

from starflow2_jax.inference import load
from starflow2_jax.serving.settings import Settings

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SETTINGS = Settings(max_batch=4, lengths=(220,), chunk=4, timeout=120.0, max_tokens=12)
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture
def page(parts):
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with live_server.serve(load.load(parts[1]), SETTINGS, name="tiny") as (port, _):
        with playwright.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
            page = browser.new_page(viewport={"width": 380, "height": 720})
            page.set_default_timeout(120_000)
            problems = []
            page.on("console", lambda m: m.type == "error" and problems.append(m.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            yield page
            browser.close()
        assert not problems


def ask(page, text, modalities):
    page.locator("details").evaluate("node => { node.open = true }")
    page.select_option("#modalities", modalities)
    count = page.locator(".message.assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    answer = page.locator(".message.assistant").nth(count)
    page.get_by_role("button", name="Send", exact=True).wait_for()
    return answer


@pytest.mark.slow
def test_a_conversation_on_the_page(page):
    assert page.locator("#model").text_content() == "tiny"
    # The page fits a phone.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    answer = ask(page, "hello", "text")
    assert "nats" in answer.text_content()
    page.fill("#n", "2")
    answer = ask(page, "a red circle", "image")
    assert answer.locator("img").count() == 2 and answer.locator(".candidate.chosen").count() == 1
    totals = answer.locator(".candidate > .note").all_text_contents()
    nats = [float(total.split()[1]) for total in totals]
    assert nats == sorted(nats, reverse=True)
    answer.get_by_text("Use this one").nth(1).click()
    page.fill("#n", "1")
    answer.get_by_text("Edit").first.click()
    assert page.locator("#attached img").count() == 1
    edited = ask(page, "make it blue", "image")
    assert edited.locator("img").evaluate("image => image.naturalWidth") == 16
    count = page.locator(".message").count()
    page.reload()
    assert page.locator(".message").count() == count == 6
    again = ask(page, "and this?", "text")
    assert "nats" in again.text_content()
    page.click("#clear")
    assert page.locator(".message").count() == 0
