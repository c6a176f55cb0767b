"""The chat page in Chromium: type, receive an answer and an image, ask for an edit, reload."""

import pytest
from helpers import chat_page, live_server
from helpers.chat_page import ask, edit_image
from PIL import Image

from starflow2_jax.inference import load
from starflow2_jax.serving.settings import Settings

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
pytest.importorskip("playwright.sync_api", reason="needs the extra [browser]")
if chat_page.CHROMIUM is None:
    pytest.skip(chat_page.MISSING, allow_module_level=True)
SETTINGS = Settings(max_batch=4, lengths=(220,), chunk=4, timeout=120.0, max_tokens=12)


@pytest.fixture
def page(parts):
    with (
        live_server.serve(load.load(parts[1]), SETTINGS, name="tiny") as (port, _),
        chat_page.open_page(port, 380, 720) as page,
    ):
        yield page


@pytest.mark.slow
def test_a_conversation_on_the_page(page, tmp_path):
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
    edited = edit_image(page, answer, "make it blue")
    assert page.locator(".message.user img").count() == 1
    assert edited.locator("img").evaluate("image => image.naturalWidth") == 16
    count = page.locator(".message").count()
    page.reload()
    assert page.locator(".message").count() == count == 6
    again = ask(page, "and this?", "text")
    assert "nats" in again.text_content()
    page.click("#clear")
    assert page.locator(".message").count() == 0
    chat_page.take_screenshot(page, str(tmp_path / "page.png"), "a circle", "make it red", 1)
    assert Image.open(tmp_path / "page.png").size == (380, 720)
    assert page.locator(".message.assistant img").count() == 2
