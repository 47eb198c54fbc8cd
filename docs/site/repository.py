"""Hooks of the site: what pages link to outside of docs/ becomes a page, and headings get a repository's anchors.

A link such as `../CONTRIBUTING.md#checks` works in the repository as it is written. In the site it leads to a copy
under `repository/`: a Markdown file as a page, a drawing as it is, and any other file as a page that shows its text.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

DOCS, COPIES = "docs/", "repository/"
ALWAYS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
DRAWINGS = (".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(\]\(|\b(?:src|srcset|href)=")([^)"\s#:]+)(?=[)"#])')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Anchors as a repository makes them, so that a link holds in both places."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what lies outside of docs/ and is linked to, from a page or from another file so added."""
    root = Path(config.config_file_path).parent
    written = [DOCS + file.src_uri for file in files.documentation_pages()]
    for place in _outside(root, written):
        uri, source = _uri(place), root / place
        if uri.endswith(".md"):
            added = File.generated(config, uri, content=_shown(source), inclusion=InclusionLevel.NOT_IN_NAV)
        else:
            added = File.generated(config, uri, abs_src_path=str(source))
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page with its links led to where the site has what they name."""
    uri = page.file.src_uri
    place = uri.removeprefix(COPIES) if uri.startswith(COPIES) else DOCS + uri

    def led(match: re.Match[str]) -> str:
        return match[1] + posixpath.relpath(_uri(_named(match[2], place)), posixpath.dirname(uri) or ".")

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(led, text) for text in parts[::2]]
    return "".join(parts)


def _outside(root: Path, pages: list[str]) -> Iterator[str]:
    """Places outside of docs/ that pages link to, and that these link to in turn."""
    known, left = set(pages), [*pages, *ALWAYS]
    while left:
        place = left.pop()
        if not place.startswith(DOCS) and place not in known:
            known.add(place)
            yield place
        if place.endswith(".md"):
            text = "".join(FENCE.split((root / place).read_text(encoding="utf-8"))[::2])
            named = {_named(match[2], place) for match in LINK.finditer(text)}
            left += sorted(other for other in named - known if (root / other).is_file())


def _named(target: str, place: str) -> str:
    """What a link on the page at `place` names, as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), target))


def _uri(place: str) -> str:
    """Where the site has what lies at `place` in the repository."""
    if place.startswith(DOCS):
        return place.removeprefix(DOCS)
    return COPIES + place + ("" if place.endswith((".md", *DRAWINGS)) else ".md")


def _shown(source: Path) -> str:
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    return f"# {source.name}\n\n````{LANGUAGES.get(source.suffix, 'text')}\n{text.rstrip()}\n````\n"
