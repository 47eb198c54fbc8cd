"""Draws inspect.png: the page of a prompt with a question, some steps after its prefill.

Run it from anywhere: `python docs/figures/make_inspect.py`. It needs Chromium and playwright; the page itself is
written to out/inspect.html.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright

from lazyllm import LazyPipeline
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.tasks import Maker, make_items
from lazyllm.models.loading import load_model
from lazyllm.pages import inspect

TOKENS, NEW_TOKENS, STEP, SEED = 2400, 24, 4, 1
PAGE = Path("out/inspect.html")


def write() -> Path:
    """The page of a question about a number in presidential addresses, whose texts are in the public domain."""
    with quiet_loading():
        model, tokenizer = load_model(packaged_model(), dtype=torch.float32)
    (item,) = make_items("needle", Maker(tokenizer, TOKENS), 1, seed=SEED)
    pipe = LazyPipeline.from_preset("recommended", model, tokenizer)
    PAGE.parent.mkdir(exist_ok=True)
    title = "A question about presidential addresses, SmolLM2-135M-Instruct, recommended"
    return inspect(pipe, item.prompt, PAGE, title=title, max_new_tokens=NEW_TOKENS, do_sample=False)


def photograph(page: Path, path: Path) -> None:
    """The window of a browser at the step, with a revived token chosen."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 1180, "height": 860})
        window.goto(page.resolve().as_uri())
        window.locator("#step").fill(str(STEP))
        window.locator("#revived button").first.click()
        window.screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    photograph(write(), Path(__file__).with_name("inspect.png"))
