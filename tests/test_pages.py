"""The pages, looked at in a real browser: they work, say nothing to anybody, and can be read."""

from dataclasses import replace

import pytest
from playwright.sync_api import expect

from lazyllm.pages import report
from lazyllm.pages.inspection import record, save_inspection
from tests.pages import (
    CELLS,
    HOSTILE,
    LAYERS,
    TASKS,
    chromium,
    drawn,
    made_study,
    opened,
    overflows,
    poor_contrasts,
    pruning_pipe,
    seen,
)

STORY = "It was a bright cold day in April, and the clocks were striking thirteen.\n\n" * 4


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


# -- inspect ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inspection():
    return record(pruning_pipe(), STORY + HOSTILE + "What did they do?", max_new_tokens=6, do_sample=False)


@pytest.fixture(scope="module")
def inspected(inspection, tmp_path_factory):
    return save_inspection(inspection, tmp_path_factory.mktemp("pages") / "inspect.html")


def go(page, step: int) -> None:
    page.locator("#step").fill(str(step))


def test_the_text_is_shown_token_by_token_as_it_is(browser, inspection, inspected):
    with opened(browser, inspected) as page:
        texts = page.locator("#text span").evaluate_all("spans => spans.map((span) => span.textContent)")
    assert len(texts) == len(inspection.pieces)
    plain = "".join(text for text, piece in zip(texts, inspection.pieces, strict=True) if piece)
    assert plain == seen(STORY + HOSTILE + "What did they do?")


def test_lone_surrogates_are_shown_by_number(browser, inspection, tmp_path):
    pieces = ["\ud800", *inspection.pieces[1:]]
    path = save_inspection(replace(inspection, pieces=pieces, model="\udfff"), tmp_path / "page.html")
    with opened(browser, path) as page:
        assert page.locator("#t0").text_content() == "⟨U+D800⟩"


@pytest.mark.parametrize("step", range(6))
def test_every_step_shows_its_depths_and_its_revivals(browser, inspection, inspected, step):
    shades = {0: 0, 1: 2, 3: 6, LAYERS: 8}
    with opened(browser, inspected) as page:
        go(page, 5)
        go(page, step)
        classes = page.locator("#text span").evaluate_all("spans => spans.map((span) => span.className.split(' '))")
        happened = page.locator("#happened").text_content()
        reply = page.locator("#reply").text_content()
    for token, (names, depth) in enumerate(zip(classes, inspection.depths[step], strict=True)):
        assert names[0] == f"d{shades[int(depth)]}", token
    revived = [token for token, names in enumerate(classes) if "revived" in names]
    told = [] if step == 0 else inspection.steps[step].revived.tolist()
    assert revived == told
    assert step == 0 or f"{len(told)} token" in happened
    assert step == 0 or told
    assert reply == seen("".join(inspection.reply[: step + 1]))


def test_marks_are_shown(browser, inspection, inspected):
    with opened(browser, inspected) as page:
        found = page.locator("#text .protected").count()
    assert found == inspection.protected.sum() == 5


def test_the_keyboard_moves_steps_and_tokens(browser, inspected):
    with opened(browser, inspected) as page:
        page.keyboard.press("ArrowRight")
        assert page.locator("#step").input_value() == "1"
        page.locator("#step").focus()
        page.keyboard.press("ArrowRight")
        assert "step 2 of 5" in page.locator("#happened").text_content()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        page.locator("#text").focus()
        for key, active in {"ArrowRight": 0, "End": None, "Home": 0, "ArrowDown": None, "ArrowUp": 0}.items():
            page.keyboard.press(key)
            found = page.locator("#text").get_attribute("aria-activedescendant")
            assert found == (found if active is None else f"t{active}")
        page.keyboard.press("ArrowDown")
        assert page.locator("#text").get_attribute("aria-activedescendant") != "t0"
        assert page.locator("#step").input_value() == "2"


def test_a_token_tells_its_scores(browser, inspection, inspected):
    token = int(inspection.steps[3].revivals[0].token)
    with opened(browser, inspected) as page:
        page.locator(f"#t{token}").hover()
        assert f"id {inspection.token_ids[token]}" in page.locator("#token").text_content()
        rows = page.locator("#token tbody tr")
        layers = [cut.layer for cut in inspection.cuts if cut.ranks[token]]
        assert [int(rows.nth(at).locator("td").nth(1).text_content()) for at in range(rows.count())] == layers
        go(page, 3)
        assert "step 3" in rows.last.text_content()
        assert "revived" in rows.last.text_content()


def test_chips_lead_to_revived_tokens(browser, inspection, inspected):
    with opened(browser, inspected) as page:
        go(page, 1)
        assert page.locator("#revived button").count() == len(inspection.steps[1].revived)
        page.locator("#revived button").first.click()
        assert page.locator("#text").get_attribute("aria-activedescendant") == f"t{inspection.steps[1].revived[0]}"


def test_bars_are_the_shares_computed(browser, inspection, inspected):
    with opened(browser, inspected) as page:
        go(page, 5)
        heights = page.locator("#bars > div").evaluate_all("bars => bars.map((bar) => parseFloat(bar.style.height))")
    expected = [100 * float((inspection.depths[5] > layer).mean()) for layer in range(LAYERS)]
    assert heights == pytest.approx(expected, abs=1e-3)


def test_a_text_that_scrolls_under_a_resting_pointer_is_not_pointed_at(browser, inspected):
    with opened(browser, inspected, width=360) as page:
        page.locator("#t200").hover()
        for _ in range(4):
            page.mouse.wheel(0, 27)
            page.wait_for_timeout(150)
        assert page.evaluate("scrollY") > 0
        assert page.locator("#text").get_attribute("aria-activedescendant") == "t200"


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read(browser, inspected, dark):
    with opened(browser, inspected, dark=dark) as page:
        page.locator("#t3").hover()
        for step in (0, 3):
            go(page, step)
            assert poor_contrasts(page) == {}


def test_the_button_changes_the_colours(browser, inspected):
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, inspected) as page:
        light = page.evaluate(background)
        page.locator("#theme").click()
        assert page.evaluate(background) == light
        page.locator("#theme").click()
        assert page.evaluate(background) != light
        assert poor_contrasts(page) == {}


def test_a_narrow_screen_need_not_scroll_sideways(browser, inspected):
    with opened(browser, inspected, width=360) as page:
        assert not overflows(page)


# -- report ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study():
    figures = [drawn("Front"), drawn("Curve")]
    return replace(made_study(), figures=figures)


@pytest.fixture(scope="module")
def reported(study, tmp_path_factory):
    return report(study, tmp_path_factory.mktemp("pages") / "report.html")


def column(page, number: int) -> list[str]:
    """The texts of a column, from the first row that is shown to the last."""
    cells = page.locator(f"#cells tbody tr:not([hidden]) td:nth-child({number})")
    return cells.evaluate_all("cells => cells.map((cell) => cell.textContent)")


def settle(page) -> None:
    """Waits for the list of items to be drawn."""
    expect(page.locator("#place")).to_contain_text(" of ")


def listed(page) -> list[str]:
    settle(page)
    return page.locator("#items summary > span:first-child").all_text_contents()


def test_a_report_shows_texts_as_they_are(browser, reported):
    with opened(browser, reported) as page:
        assert page.locator("h1").text_content() == f"Protection {HOSTILE}"
        assert HOSTILE in page.locator(".prose").text_content()
        settle(page)
        page.locator("#items summary").first.click()
        prompt = page.locator("#items pre").text_content()
        assert prompt.startswith("prompt 0 ⟨U+D800⟩ <script>window.ran = 1</script>")
        assert page.locator("#items tbody tr").count() == len(CELLS)


def test_sorting_sorts(browser, reported):
    with opened(browser, reported) as page:
        speedup = page.get_by_role("button", name="speedup")
        speedup.click()
        assert (
            column(page, 6)
            == ["10.0 (9.0 to 11.0)"] * 2 + ["20.0 (19.0 to 21.0)"] * 2 + ["30.0 (29.0 to 31.0)"] * 2 + ["–"] * 2
        )
        speedup.press("Enter")
        assert column(page, 6)[0] == "30.0 (29.0 to 31.0)"
        assert column(page, 6)[-1] == "–"
        assert page.locator("th[aria-sort=descending]").text_content() == "speedup"
        page.get_by_role("button", name="protect.recent").click()
        assert column(page, 2)[:6] == ["0", "0", "64", "64", "256", "256"]


def test_filters_filter_rows(browser, reported):
    with opened(browser, reported) as page:
        filters = page.locator("#filters")
        filters.locator("select[name='protect.recent']").select_option("64")
        assert column(page, 1) == ["recent=64"] * 2
        filters.locator("select[name=task]").select_option("squad")
        assert column(page, 3) == ["squad"]
        assert "1 of 8 rows" in filters.text_content()


def test_items_are_paged_and_filtered(browser, reported):
    with opened(browser, reported) as page:
        items = page.locator("#item-filters")
        assert len(listed(page)) == 20
        assert page.locator("#place").text_content() == "1 to 20 of 230 items"
        page.locator("#next").click()
        expect(page.locator("#place")).to_contain_text("21 to 40")
        assert listed(page)[0] == "needle 20"
        items.locator("select[name=outcome]").select_option("won")
        expect(page.locator("#place")).to_contain_text("115")
        assert listed(page)[:2] == ["needle 0", "needle 2"]
        items.locator("select[name=task]").select_option(label="squad")
        expect(page.locator("#items")).to_contain_text("No item passes")
        items.locator("select[name=outcome]").select_option("lost")
        expect(page.locator("#items")).to_contain_text("squad 1")
        items.locator("select[name=cell]").select_option(label="recent=256")
        items.locator("select[name=outcome]").select_option("without a result")
        expect(page.locator("#items")).to_contain_text("error: NaN scores")


def test_a_search_looks_into_prompts_and_replies(browser, reported):
    with opened(browser, reported) as page:
        settle(page)
        for sought in ("prompt 217", "recent=64 says 217"):
            page.locator("input[type=search]").fill(sought)
            expect(page.locator("#place")).to_have_text("1 to 1 of 1 item")
            assert listed(page) == ["squad 217"]
            page.locator("input[type=search]").fill("")
            expect(page.locator("#place")).to_contain_text("230")


def test_a_rows_name_shows_its_items(browser, reported):
    with opened(browser, reported) as page:
        settle(page)
        page.locator("#cells .link", has_text="recent=64").first.click()
        expect(page.locator("#items")).to_contain_text("recent=64 says 0")
        assert page.locator("#cells tr.chosen").count() == len(TASKS)


def test_without_prompts_there_are_none(browser, study, tmp_path):
    path = report(study, tmp_path / "report.html", prompts=False)
    assert path.stat().st_size < report(study, tmp_path / "whole.html").stat().st_size
    with opened(browser, path) as page:
        settle(page)
        assert page.locator("script[id^=prompts]").count() == 0
        page.locator("#items summary").first.click()
        page.wait_for_selector("#items tbody tr")
        assert page.locator("#items pre").count() == 0


@pytest.mark.parametrize("dark", [False, True])
def test_a_report_can_be_read(browser, reported, dark):
    with opened(browser, reported, dark=dark) as page:
        settle(page)
        page.locator("#items summary").first.click()
        page.wait_for_selector("#items tbody tr")
        page.locator("#cells .link").first.click()
        assert poor_contrasts(page) == {}
        inks = page.locator(".drawing svg text").evaluate_all("all => all.map((text) => getComputedStyle(text).fill)")
        assert set(inks) == {page.evaluate("getComputedStyle(document.body).color")}
        assert all(
            len(text) > 40 for text in page.locator(".drawing").evaluate_all("all => all.map((e) => e.ariaLabel)")
        )


def test_a_report_fits_a_narrow_screen(browser, reported):
    with opened(browser, reported, width=360) as page:
        settle(page)
        assert not overflows(page)


def test_a_study_without_items_shows_its_table(browser, study, tmp_path):
    with opened(browser, report(replace(study, items=[]), tmp_path / "report.html")) as page:
        assert page.locator("#cells tbody tr").count() == 8
        assert not page.locator("#items-section").is_visible()
