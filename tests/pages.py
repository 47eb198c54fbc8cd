"""What the tests of pages share: a model that reads any text byte by byte, hostile texts, and eyes for a page."""

import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lazyllm import LazyPipeline
from lazyllm.evaluation.plots import new_figure
from lazyllm.pages import Column, Estimate, Figure, Item, Reply, ReportData, Row
from lazyllm.pages.drawing import inline_svg, page_style

HOSTILE = (
    "<script>window.ran = 1</script> </script> <!-- <b onclick='x()'> \"'&amp; \u2028 \u202e \x07 "
    "مرحبا بالعالم 👩\u200d🚀 </style>"
)
LAYERS = 4


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, so that a character may take four."""
    alphabet = {letter: index for index, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@cache
def byte_model() -> LlamaForCausalLM:
    """A random model for these tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.float64).eval().requires_grad_(False)


def pruning_pipe(**policies) -> LazyPipeline:
    """Cuts twice in prefill, and revives up to eight tokens in every later step."""
    chosen = {
        "scorer": "WindowAttention(window=4)", "schedule": "Stages({1: 0.5, 3: 0.25})",
        "cache": "AuxCache(max_revived=8)", "protect": {"sinks": 2, "recent": 3}, **policies,
    }  # fmt: skip
    return LazyPipeline(byte_model(), byte_tokenizer(), **chosen)


def drawn(title: str) -> Figure:
    """A drawing with words and lines in the page's ink, and a colour of its own."""
    with page_style():
        canvas = new_figure((4, 3))
        axes = canvas.subplots()
        axes.plot([1, 2, 4], [0.1, 0.2, 0.3], marker="o", label="ours")
        axes.set(xlabel="TTFT speedup", ylabel="change of loss")
        axes.legend()
    return Figure(title, inline_svg(canvas), f"{title}: change of loss over TTFT speedup, 0.1 at 1.")


def seen(text: str) -> str:
    """A text as a page shows it: characters that cannot be seen, or that turn others, by their number."""

    def is_strange(letter: str) -> bool:
        return letter not in "\t\n\u200c\u200d" and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")

    return "".join(f"⟨U+{ord(letter):04X}⟩" if is_strange(letter) else letter for letter in text)


# -- in a browser ----------------------------------------------------------------------------------

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def chromium() -> Iterator:
    """The browser of the system."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "the pages are tested in Chromium, which is not installed (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


@contextmanager
def window(
    browser, url: str, *, dark: bool = False, width: int = 1280, height: int = 800, moving: bool = False
) -> Iterator[tuple]:
    """A page in a window of its own, the faults it reports and the addresses it asks for."""
    context = browser.new_context(
        color_scheme="dark" if dark else "light",
        viewport={"width": width, "height": height},
        reduced_motion="no-preference" if moving else "reduce",
    )
    page = context.new_page()
    faults, requests = [], []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(url)
        yield page, faults, requests
        assert page.evaluate("window.ran") is None
    finally:
        context.close()


@contextmanager
def opened(browser, path: Path, **look) -> Iterator:
    """The page of a file; at the end it has reported no error and asked for nothing but itself."""
    with window(browser, path.as_uri(), **look) as (page, faults, requests):
        yield page
        assert faults == []
        assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}


CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = channels(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const own = (node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const poor = new Map();
  for (const node of document.querySelectorAll("body *")) {
    if (!own(node) || !node.getClientRects().length || node.closest("svg")) continue;
    const [ink, paper] = [channels(getComputedStyle(node).color).slice(0, 3), background(node)].map(luminance);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5) poor.set(`${node.tagName}.${node.className}`, contrast.toFixed(2));
  }
  return Object.fromEntries(poor);
}"""


def poor_contrasts(page) -> dict[str, str]:
    """Elements whose text has a contrast below 4.5, and the contrast."""
    return page.evaluate(CONTRASTS)


def overflows(page) -> bool:
    """Whether one must scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


# -- a study ---------------------------------------------------------------------------------------

TASKS = ("needle", "squad")
CELLS = ("dense", "recent=0", "recent=64", "recent=256")


def made_study(items: int = 230) -> ReportData:
    """A study whose numbers follow from their places: item i of a cell has the score (i + cell) % 2."""
    return ReportData(
        title=f"Protection {HOSTILE}",
        conditions=f"a model, 4 layers {HOSTILE}",
        axes={"protect.recent": ["0", "64", "256"]},
        columns=[Column("score", "share of right answers"), Column("speedup", digits=1), Column("note")],
        rows=[made_row(cell, at, task) for at, cell in enumerate(CELLS) for task in TASKS],
        baseline="dense",
        figures=[],
        items=[made_item(index) for index in range(items)],
        conclusions=f"Protect the end.\n\n{HOSTILE}",
        command="lazyllm ablate protection.yaml",
    )


def made_row(cell: str, at: int, task: str) -> Row:
    axes = {} if cell == "dense" else {"protect.recent": cell.partition("=")[2]}
    values = {"score": 0.5 + at / 10, "speedup": Estimate(10.0 * at, 10.0 * at - 1, 10.0 * at + 1) if at else None}
    return Row(cell, axes, task, 115, values)


def made_item(index: int) -> Item:
    replies = {
        cell: Reply(f"{cell} says {index} {HOSTILE}", float((index + at) % 2), index / 100 + at)
        for at, cell in enumerate(CELLS)
    }
    replies["recent=256"] = Reply("", error="NaN scores")
    return Item(TASKS[index % 2], index, f"prompt {index} \ud800 {HOSTILE}", f"reference {index}", ["a", "b"], replies)
