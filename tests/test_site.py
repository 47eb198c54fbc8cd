"""The documentation as a site: it builds without a warning, holds every page, and asks nobody for anything."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from lazyllm import LazyLLMError, errors
from tests.pages import chromium, overflows, window

ROOT = Path(__file__).parents[1]
QUIET = {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
SEARCH_MILLISECONDS = 120_000
"""The index is read by a worker of the browser, which may wait long on a busy machine."""
LOOKED_AT = ["index.html", "tutorial.html", "performance.html", "api/pipeline.html", "repository/index.html"]


def built(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **QUIET}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = built(folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def navigation() -> Iterator[str]:
    """The pages of the navigation."""

    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        for part in entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ():
            yield from pages(part)

    yield from pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def test_every_page_of_the_docs_is_in_the_navigation_and_in_the_site(site: Path):
    named = set(navigation())
    docs = ROOT / "docs"
    assert {str(page.relative_to(docs)) for page in docs.rglob("*.md")} <= named
    for page in named:
        assert (site / page.replace("README.md", "index.md")).with_suffix(".html").exists()


@pytest.mark.parametrize(
    ("page", "link"),
    [
        ("writing-a-policy.html", "repository/CONTRIBUTING.html#adding-a-policy"),
        ("repository/CONTRIBUTING.html", "../writing-a-policy.html#checking-it"),
        ("repository/index.html", "../figures/quality-curves.png"),
        ("presets.html", "repository/lazyllm/presets/paper.yaml.html"),
    ],
)
def test_links_that_leave_the_docs_lead_to_copies(site: Path, page: str, link: str):
    assert f'"{link}"' in (site / page).read_text(encoding="utf-8")
    assert ((site / page).parent / link.partition("#")[0]).exists()


def test_a_source_is_shown_as_it_is(site: Path):
    shown = (site / "repository/lazyllm/presets/paper.yaml.html").read_text(encoding="utf-8")
    text = re.sub(r"<[^>]+>", "", shown)
    for line in (ROOT / "lazyllm/presets/paper.yaml").read_text(encoding="utf-8").splitlines():
        assert line in text


def test_the_reference_has_signatures_and_docstrings(site: Path):
    text = re.sub(r"<[^>]+>", "", (site / "api/pipeline.html").read_text(encoding="utf-8"))
    assert "Generates a reply to a prompt, or to each of a list of prompts as one batch." in text
    assert "what the prompt asks, instead of what the scorer would take for it" in text


class Resources(HTMLParser):
    """What a page would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.found += [given.get("src") or "", given.get("srcset") or ""]
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(given.get("href") or "")


def test_no_page_names_a_resource_elsewhere(site: Path):
    pages = [page for page in site.rglob("*.html") if "studies" not in page.parts]
    assert len(pages) > 50
    for page in pages:
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert [url for url in resources.found if re.match(r"(https?:)?//", url)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_a_dead_anchor_is_an_error(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[there](index.md#nowhere)\n", encoding="utf-8")
    ours = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    config = {"site_name": "x", "docs_dir": "docs", "theme": "material", "validation": ours["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    done = built(tmp_path / "out", "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode == 1
    assert "nowhere" in done.stderr


# -- in a browser ----------------------------------------------------------------------------------


class Silent(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site)))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize(("dark", "width"), [(True, 400), (False, 1200)], ids=["dark and narrow", "light and wide"])
def test_pages_fit_and_ask_nobody_else(browser, address: str, dark: bool, width: int):
    for page in LOOKED_AT:
        with window(browser, address + page, dark=dark, width=width) as (view, faults, requests):
            view.wait_for_load_state("networkidle")
            assert not overflows(view), page
            assert faults == [], page
            assert {url for url in requests if not url.startswith((address, "data:"))} == set(), page


def test_the_page_of_errors_has_each_of_them():
    page = (ROOT / "docs/api/errors.md").read_text()
    told = re.findall(r"^[│├└─ ]*([A-Z]\w+)(?: |$)", page.split("```")[1], re.MULTILINE)
    explained = re.findall(r"^::: lazyllm\.(?:errors\.)?(\w+)$", page, re.MULTILINE)
    defined = [name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, LazyLLMError)]
    assert sorted(told) == sorted(explained) == sorted(defined)


def test_the_search_finds_a_word(browser, address: str):
    with window(browser, address + "index.html") as (view, faults, _):
        view.locator("input[name=query]").fill("revived")
        view.locator(".md-search-result__link").first.wait_for(state="attached", timeout=SEARCH_MILLISECONDS)
        assert faults == []
