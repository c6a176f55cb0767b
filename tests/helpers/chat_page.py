"""The chat page in Debian's Chromium, by Playwright (the extra `browser`)."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MISSING = "needs Chromium: apt install chromium"


@contextlib.contextmanager
def open_page(port: int, width: int, height: int, **options: Any) -> Iterator[Any]:
    """Yield the page of a server on this machine; errors in its console fail at the end."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": width, "height": height}, **options)
        page.set_default_timeout(120_000)
        problems = []
        page.on("console", lambda m: m.type == "error" and problems.append(m.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        yield page
        browser.close()
    assert not problems


def ask(page: Any, text: str, modalities: str) -> Any:
    """Send a message, wait for the whole answer and return it."""
    page.locator("details").evaluate("node => { node.open = true }")
    page.select_option("#modalities", modalities)
    count = page.locator(".message.assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    answer = page.locator(".message.assistant").nth(count)
    page.get_by_role("button", name="Send", exact=True).wait_for()
    return answer


def edit_image(page: Any, answer: Any, text: str) -> Any:
    """Attach the first image of an answer, ask for an edit of it and return the new answer."""
    answer.get_by_text("Edit").first.click()
    return ask(page, text, "image")


def take_screenshot(page: Any, path: str, prompt: str, edit: str, seed: int) -> None:
    """Draw an image, edit it, and write a PNG of the page that shows both."""
    page.locator("details").evaluate("node => { node.open = true }")
    page.fill("#seed", str(seed))
    answer = ask(page, prompt, "image")
    edit_image(page, answer, edit)
    page.locator("details").evaluate("node => { node.open = false }")
    page.locator("#thread").evaluate("node => { node.scrollTop = 0 }")
    page.screenshot(path=path)
