"""The terminal recording: its file, what is drawn of it, and when."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pyte
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

FOLDER = Path(__file__).parents[1] / "docs" / "recording"
SVG = "{http://www.w3.org/2000/svg}"
WIDTH, HEIGHT = 12, 4


@pytest.fixture(scope="module")
def scripts():
    """The modules, which find each other as they do when one is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        import animation
        import cast
        import record

        yield SimpleNamespace(animation=animation, cast=cast, record=record)


pieces = st.lists(
    st.one_of(
        st.text("ab <&>", min_size=1, max_size=9),
        st.sampled_from(
            ["\r\n", "\r", "\x1b[2K", "\x1b[A", "\x1b[31mred\x1b[0m", "\x1b[1;7mbold\x1b[0m", "\x1b[2J\x1b[H"]
        ),
    ),
    min_size=1,
    max_size=12,
)
pauses = st.lists(st.floats(0.0, 3.0), min_size=12, max_size=12)


def made(scripts, texts: list[str], gaps: list[float]):
    now, events = 0.0, []
    for text, gap in zip(texts, gaps, strict=False):
        now += gap
        events.append((round(now, 3), text))
    return scripts.cast.Cast(WIDTH, HEIGHT, tuple(events))


def screen_of(texts: list[str]) -> list[str]:
    """What a terminal shows of these texts, line by line."""
    screen = pyte.Screen(WIDTH, HEIGHT)
    stream = pyte.Stream(screen)
    for text in texts:
        stream.feed(text)
    return [line.rstrip() for line in screen.display]


def seen(svg: str, share: float | None) -> list[str]:
    """The lines of an SVG at a share of its loop, read off its style sheet; without animation for None."""
    root = ElementTree.fromstring(svg)
    styles = root.find(f"{SVG}style").text
    cells = [[" "] * WIDTH for _ in range(HEIGHT)]
    for group in root.iter(f"{SVG}g"):
        name = group.get("class")
        if name is None or not is_seen(styles, name, share):
            continue
        for text in group.iter(f"{SVG}text"):
            column, line = round(float(text.get("x")) / 8), int(float(text.get("y")) // 18)
            assert float(text.get("textLength")) == 8 * len(text.text)
            cells[line][column : column + len(text.text)] = text.text
    return ["".join(line).rstrip() for line in cells]


def is_seen(styles: str, name: str, share: float | None) -> bool:
    if share is None:
        return f".{name}{{visibility:visible" in styles
    frames = re.search(rf"@keyframes {name}{{((?:[^{{}}]+{{[^}}]*}})+)}}", styles).group(1)
    state = "hidden"
    for moments, value in re.findall(r"([^{}]+){visibility:(\w+)}", frames):
        start = float(moments.split(",")[0].rstrip("%")) / 100
        state = value if start <= share else state
    return state == "visible"


@given(texts=pieces, gaps=pauses)
@example(texts=["<", "<"], gaps=[0.40625, 0.0])  # both at once, after a pause
def test_at_any_moment_the_drawing_shows_what_the_terminal_showed(scripts, texts, gaps):
    cast = made(scripts, texts, gaps)
    svg = scripts.animation.svg_of(cast)
    loop = cast.seconds + scripts.animation.LAST_SECONDS
    for (seconds, _), (after, _) in pairwise([*scripts.animation.frames(cast), (loop, [])]):
        written = [text for when, text in cast.events if when <= seconds]
        assert seen(svg, (seconds + after) / 2 / loop) == screen_of(written)
    assert seen(svg, None) == screen_of(texts), "without animation, the end is seen"


def test_colours_and_what_is_bold_are_kept(scripts):
    cast = made(scripts, ["\x1b[1;32mgo\x1b[0m on \x1b[7mback\x1b[0m"], [0.0])
    svg = scripts.animation.svg_of(cast)
    rules = dict(re.findall(r"\.(s\d+){([^}]*)}", svg))
    words = {text: rules[name] for name, text in re.findall(r'class="(s\d+)"[^>]*>([^<]*)<', svg)}
    assert words["go"] == f"fill:{scripts.animation.COLOURS['green']};font-weight:bold"
    assert words["on"] == f"fill:{scripts.animation.INK}"
    assert words["back"] == f"fill:{scripts.animation.PAPER}"
    assert f'height="18" fill="{scripts.animation.INK}"' in svg


@given(texts=pieces, gaps=pauses, longest=st.floats(0.1, 2.0))
def test_pauses_are_cut_and_nothing_else(scripts, texts, gaps, longest):
    cast = made(scripts, texts, gaps)
    cut = cast.without_pauses(longest)
    assert [text for _, text in cut.events] == [text for _, text in cast.events]
    times, before = ([0.0, *(when for when, _ in one.events)] for one in (cut, cast))
    for (start, stop), (old_start, old_stop) in zip(pairwise(times), pairwise(before), strict=True):
        assert stop - start == pytest.approx(min(longest, old_stop - old_start), abs=2e-3)


def test_a_recording_is_read_as_it_was_written(scripts, tmp_path):
    cast = made(scripts, ["a\r\n", "\u276f \x1b[31m\u00e9"], [0.5, 1.25])
    path = cast.save(tmp_path / "one.cast")
    assert scripts.cast.Cast.load(path) == cast
    path.write_text(path.read_text(encoding="utf-8").replace('"version": 2', '"version": 3'), encoding="utf-8")
    with pytest.raises(ValueError, match="no asciicast of version 2"):
        scripts.cast.Cast.load(path)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # of Python 3.12 and later
def test_a_session_is_typed_into_a_shell(scripts, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts.record, "READ_SECONDS", 0.05)
    (tmp_path / "note.txt").write_text("forty two\n", encoding="utf-8")
    cast = scripts.record.recorded(tmp_path, [scripts.record.Line("cat note.txt")])
    *_, (_, last) = scripts.animation.frames(cast)
    shown = ["".join(run.text for run in row) for row in last]
    assert shown[:2] == ["\u276f cat note.txt", "forty two"]


def test_the_drawing_plays_anywhere(scripts):
    svg = scripts.animation.svg_of(made(scripts, ["one\r\n", "\x1b[31mtwo <&>"], [0.2, 1.0]), "a <title>")
    root = ElementTree.fromstring(svg)
    assert not [tag for tag in root.iter() if tag.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}foreignObject")]
    assert not re.findall(r"url\(|@import|href", svg)
    assert svg.count("@keyframes") == 2
    assert root.find(f"{SVG}title").text == "a <title>"
