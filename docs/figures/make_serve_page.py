"""Draws serve-page.png: the page of a server that has answered a question about a loaded text.

Start a server first, then run it from anywhere: `python docs/figures/make_serve_page.py http://127.0.0.1:8000/`. It
needs Chromium and playwright.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from lazyllm.evaluation.data import packaged_speech

SPEECH, CHARACTERS, HIDDEN_BEHIND = "1962-Kennedy-1", 7000, 1200
SECRET, QUESTION = "The secret number of lantern is 482913.", "What is the secret number of lantern?"
PATIENCE_MS, FLASH_MS = 240_000, 1500


def text() -> str:
    """The beginning of an address, whose text is in the public domain, with a sentence that does not belong there."""
    speech = packaged_speech(SPEECH)[:CHARACTERS]
    at = speech.index("\n\n", HIDDEN_BEHIND)
    return f"{speech[:at]}\n\n{SECRET}{speech[at:]}"


def ask(page: Page) -> None:
    """Loads the text, asks, and waits until the answer is complete and nothing flashes."""
    page.locator("#files").set_input_files(
        [{"name": "state-of-the-union.txt", "mimeType": "text/plain", "buffer": text().encode()}]
    )
    page.get_by_label("Load first").check()
    page.locator("#load").click()
    expect(page.locator("#load-status")).to_contain_text("wait behind", timeout=PATIENCE_MS)
    page.locator("#question").fill(QUESTION)
    page.locator("#question").press("Enter")
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(1, timeout=PATIENCE_MS)
    page.wait_for_timeout(FLASH_MS)


def photograph(url: str, path: Path) -> None:
    """The window of a browser behind the answer."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 860})
        page.goto(url)
        ask(page)
        page.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    photograph(sys.argv[1], Path(__file__).with_name("serve-page.png"))
