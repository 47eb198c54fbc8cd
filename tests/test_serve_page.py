"""The page of the server, in a real browser, against a server that says what a test has written for it."""

import re
import threading
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import expect

from lazyllm.pages.render import asset
from tests.pages import HOSTILE, chromium, overflows, poor_contrasts, seen, window
from tests.stub_server import (
    PAGE,
    PATIENCE_SECONDS,
    Lost,
    Reply,
    answer,
    depths,
    prompt,
    refusal,
    stub_server,
    text,
    usage,
)

PIECES = ["<|user|>\n", "The", " report", " of", " sales", ".\n\n", "Why", "?", "<|end|>\n"]
REACHED = [30, 0, 9, 9, 0, 1, 30, 30, 30]
LOADED = {
    "id": "doc-1", "object": "document", "tokens": 1234, "depth": 1, "layers": 30, "seconds": 0.5, "bytes": 5_000_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def stub():
    with stub_server() as running:
        yield running


@contextmanager
def visited(browser, stub, **look):
    """The page; at the end it has reported no fault but refused requests, and has spoken with its server alone."""
    with window(browser, stub.url, **look) as (page, faults, requests):
        yield page
        assert [fault for fault in faults if not fault.startswith("Failed to load resource")] == []
        assert [url for url in requests if not url.startswith((stub.url, "data:"))] == []


def ask(page, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def ended(page, number: int = 1) -> None:
    """Waits until so many answers are complete."""
    expect(page.locator(".answer[aria-busy=false]")).to_have_count(number)


def add(page, content: str) -> None:
    page.locator("#paste").fill(content)
    page.locator("#add").click()


def shown_runs(page) -> list[tuple[str, str]]:
    """Class and text of every run of the prompt, whether it still flashes or not."""
    runs = page.locator("#text .block > *").evaluate_all("runs => runs.map((run) => [run.className, run.textContent])")
    return [(name.removesuffix(" fresh"), content) for name, content in runs]


def traced(*, gate: threading.Event | None = None, revived: dict[int, int] | None = None) -> Reply:
    """A short answer with its trace; what is revived comes first, the rest when the gate is open."""

    def events():
        yield prompt(*PIECES)
        yield depths(REACHED)
        yield text("Because")
        yield depths(revived or {1: 30, 4: 30})
        if gate:
            assert gate.wait(PATIENCE_SECONDS)
        yield text(" it rained.", "stop")
        yield usage(tokens=len(PIECES), cached=1, revived=2)

    return Reply(events)


# -- answers ---------------------------------------------------------------------------------------


def test_an_answer_streams(browser, stub):
    gate = threading.Event()
    stub.says(traced(gate=gate))
    with visited(browser, stub) as page:
        ask(page, "  Why? ")
        expect(page.locator(".answer")).to_have_text("Because")
        expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
        assert page.locator("#send").text_content() == "Stop"
        gate.set()
        ended(page)
        assert page.locator(".answer").text_content() == "Because it rained."
        assert page.locator(".question").text_content() == "Why?"
        assert page.locator("#send").text_content() == "Ask"
        assert "first token after 0.25 s" in page.locator(".facts").text_content()
    ((path, headers, body),) = stub.requests
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    assert body == {
        "model": "SmolLM",
        "messages": [{"role": "user", "content": "Why?"}],
        "max_tokens": 512,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "lazyllm": {"trace": True, "query": "Why?"},
    }


def test_settings_are_sent(browser, stub):
    stub.says(answer("Yes."), answer("No."))
    with visited(browser, stub) as page:
        expect(page.locator("#policy option")).to_have_text(["recommended", "paper", "dense"])
        assert page.locator("#model").text_content() == "SmolLM"
        page.locator("#policy").select_option(label="paper")
        page.locator("#settings summary").click()
        page.locator("#max-tokens").fill("7")
        page.locator("#temperature").fill("0.5")
        ask(page, "Is it?")
        ended(page)
        page.locator("#max-tokens").fill("")
        ask(page, "Is it?")
        ended(page, 2)
    first, second = stub.bodies
    assert (first["model"], first["max_tokens"], first["temperature"]) == ("SmolLM:paper", 7, 0.5)
    assert "max_tokens" not in second


def test_a_conversation_goes_on_and_starts_anew(browser, stub):
    stub.says(answer("It", " fell."), answer("Rain."), answer("Hello."))
    with visited(browser, stub) as page:
        add(page, "The report.\r\nSales fell.")
        page.locator("#paste").fill("A note.")
        ask(page, "What fell?")
        ended(page)
        ask(page, "Why?")
        ended(page, 2)
        page.locator("#fresh").click()
        assert page.locator("#turns li").count() == 0
        page.get_by_role("button", name="remove Text 1").click()
        page.get_by_role("button", name="remove Text 2").click()
        ask(page, "Hi")
        ended(page)
    begun = {"role": "user", "content": "The report.\nSales fell.\n\nA note.\n\nWhat fell?"}
    assert [body["messages"] for body in stub.bodies] == [
        [begun],
        [begun, {"role": "assistant", "content": "It fell."}, {"role": "user", "content": "Why?"}],
        [{"role": "user", "content": "Hi"}],
    ]


@pytest.mark.parametrize(("piece", "newline"), [(1, "\n"), (7, "\r\n"), (3, "\r"), (0, "\r\n")])
def test_a_stream_may_be_cut_anywhere(browser, stub, piece, newline):
    events = [prompt(*PIECES), depths(REACHED), text("Größe 👩\u200d🚀 \u2028"), text(" = 7", "stop"), usage()]
    stub.says(Reply(lambda: iter(events), piece=piece, newline=newline))
    with visited(browser, stub) as page:
        ask(page, "Wie groß?")
        ended(page)
        assert page.locator(".answer").text_content() == seen("Größe 👩\u200d🚀 \u2028 = 7")
        assert "".join(content for _, content in shown_runs(page)) == "".join(PIECES)


def test_an_answer_that_was_cut_off_is_told(browser, stub):
    stub.says(Reply(lambda: iter([text("It", "length"), usage()])))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator(".facts")).to_contain_text("cut off at max tokens")


# -- what was read ---------------------------------------------------------------------------------


def test_the_prompt_is_coloured_by_depth(browser, stub):
    stub.says(traced(revived={4: 30}))
    with visited(browser, stub) as page:
        assert page.locator(".hint").is_visible()
        ask(page, "Why?")
        ended(page)
        assert not page.locator(".hint").is_visible()
        assert shown_runs(page) == [
            ("d8", "<|user|>\n"),
            ("d0", "The"),
            ("d2", " report of"),
            ("d8 revived", " sales"),
            ("d1", ".\n\n"),
            ("d8", "Why?<|end|>\n"),
        ]
        titles = page.locator("#text .block > *").evaluate_all("runs => runs.map((run) => run.title)")
        assert titles[1:4] == ["0 of 30 layers", "9 of 30 layers", "30 of 30 layers, revived"]
        legend = page.locator("#legend > span").evaluate_all("all => all.map((entry) => entry.lastChild.textContent)")
        assert legend[:-1] == ["0 of 30 layers: 1", "1 of 30 layers: 1", "9 of 30 layers: 2", "30 of 30 layers: 5"]


def test_figures_run_along(browser, stub):
    gate = threading.Event()
    stub.says(traced(gate=gate))

    def figures() -> dict[str, str]:
        return page.locator(".figures div").evaluate_all(
            "all => Object.fromEntries(all.map((one) => [...one.children].map((part) => part.textContent)))"
        )

    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator("#figure-revived")).to_have_text("2")
        running = figures()
        gate.set()
        ended(page)
        complete = figures()
    computed = (sum(REACHED) + 60) / (30 * len(PIECES))
    assert running["prompt tokens"] == complete["prompt tokens"] == "9"
    assert running["computed so far"] == f"{computed:.0%}".replace("%", " %")
    assert re.fullmatch(r"[\d.]+ s", running["first token"])
    assert (running["from cache"], running["prefill"]) == ("–", "–")
    assert (complete["first token"], complete["from cache"], complete["prefill"]) == ("0.25 s", "1", "25 %")
    assert complete["revived"] == "2"


def test_revived_tokens_are_marked_while_the_answer_streams(browser, stub):
    gate = threading.Event()
    stub.says(traced(gate=gate))
    with visited(browser, stub, moving=True) as page:
        ask(page, "Why?")
        expect(page.locator("mark")).to_have_text(["The", " sales"])
        assert page.locator(".answer").get_attribute("aria-busy") == "true"
        moving = "marks => marks.map((mark) => mark.getAnimations().length)"
        assert page.locator("mark").evaluate_all(moving) == [1, 1]
        gate.set()
        ended(page)
        assert (
            page.locator("mark").evaluate_all("marks => marks.map((mark) => mark.className)")
            == ["d8 revived fresh"] * 2
        )


def test_nothing_moves_where_that_is_not_wanted(browser, stub):
    stub.says(traced())
    with visited(browser, stub) as page:
        ask(page, "Why?")
        ended(page)
        assert page.locator("mark").count() == 2
        assert page.evaluate("document.getAnimations().length") == 0


def test_a_part_of_the_prompt_can_be_shown(browser, stub):
    lines = [f"line {number}.\n" for number in range(200)]

    def events():
        yield prompt(*lines)
        yield depths([30 if number % 2 and number < 100 else 0 for number in range(200)])
        yield depths({0: 30, 199: 30})
        yield usage()

    def visible() -> str:
        large = (
            "runs => runs.filter((run) => parseFloat(getComputedStyle(run).fontSize) && run.getClientRects().length)"
        )
        return "".join(page.locator("#text .block > *").evaluate_all(f"{large}.map((run) => run.textContent)"))

    stub.says(Reply(events))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        ended(page)
        page.get_by_label("what was revived").check()
        assert visible() == lines[0] + lines[199]
        page.get_by_label("what all layers have computed").check()
        assert visible() == "".join(
            lines[number] for number in range(200) if number in (0, 199) or (number % 2 and number < 100)
        )
        page.get_by_label("all of it").check()
        assert visible() == "".join(lines)


def test_the_strip_leads_into_the_text(browser, stub):
    lines = [f"line {number}.\n" for number in range(4000)]
    stub.says(Reply(lambda: iter([prompt(*lines), depths([30] * 4000), usage()])))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        ended(page)
        box = page.locator("#strip").bounding_box()
        page.locator("#strip").click(position={"x": box["width"] / 2, "y": 10})
        expect(page.get_by_text("line 2000.")).to_be_in_viewport()


def test_ten_thousand_tokens_do_not_hold_the_page_up(browser, stub):
    tokens, steps, revived = 10_240, 100, 16
    pieces = [f" word{token}" if token % 20 else f" word{token}.\n" for token in range(tokens)]
    gate = threading.Event()

    def events():
        yield prompt(*pieces)
        yield depths([(0, 9, 18, 30)[token // 5 % 4] for token in range(tokens)])
        assert gate.wait(PATIENCE_SECONDS)
        for step in range(steps):
            yield depths(dict.fromkeys(range(step * revived, (step + 1) * revived), 30))
            yield text(f" {step}")
            time.sleep(0.01)
        yield usage(revived=steps * revived)

    stub.says(Reply(events))
    with visited(browser, stub, moving=True) as page:
        ask(page, "Why?")
        expect(page.locator("#legend")).to_contain_text("18 of 30 layers: 2,560")
        page.evaluate(
            """() => {
              document.querySelectorAll(".block > *").forEach((run) => (run.isOld = true));
              window.seen = { frames: 0, draws: 0 };
              const count = () => (window.seen.frames++, requestAnimationFrame(count));
              requestAnimationFrame(count);
              const observer = new MutationObserver(() => window.seen.draws++);
              observer.observe(document.getElementById("text"), { childList: true, subtree: true });
            }"""
        )
        gate.set()
        ended(page)
        seen_while = page.evaluate("window.seen")
        untouched = page.locator(".block:not(:has(mark))").evaluate_all(
            "blocks => blocks.every((block) => [...block.children].every((run) => run.isOld))"
        )
        assert "".join(page.locator("mark").all_text_contents()) == "".join(pieces[: steps * revived])
        assert page.locator("#figure-revived").text_content() == "1,600"
        assert page.locator(".answer").text_content() == "".join(f" {step}" for step in range(steps))
    assert untouched
    assert seen_while["frames"] >= steps / 10
    assert 1 < seen_while["draws"] <= seen_while["frames"] + 1


# -- documents -------------------------------------------------------------------------------------


def test_files_are_chosen_listed_and_removed(browser, stub):
    stub.says(answer("Yes."))
    files = [
        {"name": "a.md", "mimeType": "", "buffer": b"# A"},
        {"name": "picture.png", "mimeType": "image/png", "buffer": b"\x89PNG\xff"},
        {"name": "b.py", "mimeType": "", "buffer": "größe = 1\r\nx = 2\r\n".encode()},
        {"name": "zero.bin", "mimeType": "", "buffer": b"a\0b"},
        {"name": "blank.txt", "mimeType": "", "buffer": b" \n"},
    ]
    with visited(browser, stub) as page:
        page.locator("#files").set_input_files(files)
        expect(page.locator("#documents .name")).to_have_text(["a.md", "b.py"])
        for told in (
            "2 documents added",
            "picture.png is not a text in UTF-8",
            "zero.bin is not a text: it has a NUL",
            "blank.txt is empty",
        ):
            expect(page.locator("#document-status")).to_contain_text(told)
        page.get_by_role("button", name="remove a.md").click()
        expect(page.locator("#documents .name")).to_have_text(["b.py"])
        expect(page.get_by_role("button", name="remove b.py")).to_be_focused()
        ask(page, "Code?")
        ended(page)
    assert stub.bodies[0]["messages"][0]["content"] == "größe = 1\nx = 2\n\nCode?"


def test_files_are_dropped(browser, stub):
    with visited(browser, stub) as page:
        page.evaluate(
            """() => {
              const dataTransfer = new DataTransfer();
              dataTransfer.items.add(new File(["one"], "one.txt"));
              dataTransfer.items.add(new File(["two"], "two.txt"));
              for (const kind of ["dragover", "drop"]) {
                const event = new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true });
                if (document.getElementById("turns").dispatchEvent(event)) throw new Error("the browser would open it");
              }
            }"""
        )
        expect(page.locator("#documents .name")).to_have_text(["one.txt", "two.txt"])


def test_documents_are_loaded_once_and_questions_stand_alone(browser, stub):
    stub.says(Reply(body=LOADED), answer("It fell."), answer("Rain."))
    with visited(browser, stub) as page:
        assert not page.locator("#loading").is_visible()
        page.locator("#policy").select_option(label="paper")
        add(page, "The report.")
        add(page, "A note.")
        page.get_by_label("Load first").check()
        page.locator("#load").click()
        expect(page.locator("#load-status")).to_have_text("1,234 tokens wait behind 1 of 30 layers: 0.50 s, 5.0 MB")
        assert not page.locator("#load").is_visible()
        for number, question in enumerate(("What fell?", "Why?"), start=1):
            ask(page, question)
            ended(page, number)
    assert [path for path, _, _ in stub.requests] == ["/v1/documents", *["/v1/chat/completions"] * 2]
    load, *asked = stub.bodies
    assert load == {"texts": ["The report.", "A note."], "policy": "paper"}
    for body, question in zip(asked, ("What fell?", "Why?"), strict=True):
        assert body["messages"] == [{"role": "user", "content": question}]
        assert body["lazyllm"] == {"document": "doc-1", "trace": True}
        assert body["model"] == "SmolLM:paper"


def test_other_documents_are_loaded_anew(browser, stub):
    stub.says(Reply(body=LOADED), answer("Yes."), Reply(body=LOADED | {"id": "doc-2"}), answer("No."), answer("So."))
    with visited(browser, stub) as page:
        add(page, "The report.")
        page.get_by_label("Load first").check()
        ask(page, "Is it?")
        ended(page)
        add(page, "A note.")
        expect(page.locator("#load-status")).to_have_text("not loaded yet")
        ask(page, "Is it?")
        ended(page, 2)
        page.get_by_label("Load first").uncheck()
        ask(page, "And now?")
        ended(page, 3)
    documents = [body.get("lazyllm", {}).get("document") for body in stub.bodies]
    assert documents == [None, "doc-1", None, "doc-2", None]
    assert stub.bodies[2]["texts"] == ["The report.", "A note."]
    assert stub.bodies[4]["messages"] == [{"role": "user", "content": "The report.\n\nA note.\n\nAnd now?"}]


def test_documents_that_the_server_let_go_are_loaded_again(browser, stub):
    gone = refusal(404, "the document doc-1 is not loaded any more")
    stub.says(Reply(body=LOADED), answer("Yes."), gone, Reply(body=LOADED | {"id": "doc-2"}), answer("No."))
    stub.says(gone, Reply(body=LOADED), gone)
    with visited(browser, stub) as page:
        add(page, "The report.")
        page.get_by_label("Load first").check()
        ask(page, "Is it?")
        ended(page)
        ask(page, "Is it not?")
        ended(page, 2)
        assert page.locator("#problem-text").text_content() == ""
        ask(page, "Is it ever?")
        expect(page.locator("#problem-text")).to_contain_text("not loaded any more")
    assert stub.bodies[4]["lazyllm"]["document"] == "doc-2"
    assert not stub.replies


# -- stopping --------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_an_answer_can_be_stopped(browser, stub, way):
    def events():
        while not stub.left.is_set():
            yield text("on and on ")
            time.sleep(0.01)

    stub.says(Reply(events), answer("Yes."))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator(".answer")).to_contain_text("on and on")
        if way == "button":
            page.locator("#send").click()
        else:
            page.keyboard.press("Escape")
        expect(page.locator(".facts")).to_have_text("not complete")
        assert stub.left.wait(PATIENCE_SECONDS)
        assert page.locator("#problem-text").text_content() == ""
        partial = page.locator(".answer").text_content()
        ask(page, "Go on")
        ended(page, 2)
    assert stub.bodies[1]["messages"][1] == {"role": "assistant", "content": partial}


def test_a_question_that_is_stopped_before_its_answer_can_be_asked_again(browser, stub):
    gate = threading.Event()

    def events():
        yield prompt(*PIECES)
        assert gate.wait(PATIENCE_SECONDS)

    stub.says(Reply(events))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator("#text")).to_contain_text("The report")
        page.keyboard.press("Escape")
        expect(page.locator("#question")).to_have_value("Why?")
        assert page.locator("#turns li").count() == 0
        gate.set()


def test_a_conversation_that_is_left_leaves_nothing_behind(browser, stub):
    def events():
        yield prompt(*PIECES)
        while not stub.left.is_set():
            yield text("on and on ")
            time.sleep(0.01)

    stub.says(Reply(events))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator(".answer")).to_contain_text("on and on")
        page.locator("#fresh").click()
        assert stub.left.wait(PATIENCE_SECONDS)
        expect(page.locator("#send")).to_have_text("Ask")
        assert page.locator("#turns li").count() == 0
        assert page.locator("#question").input_value() == ""
        assert page.locator("#figure-ttft").text_content() == "–"
        assert page.locator("#text").text_content() == ""


# -- problems --------------------------------------------------------------------------------------

REFUSALS = {
    "400": (refusal(400, "5,000 tokens and 512 need more than 4,096 positions"), ["400", "5,000", "4,096"]),
    "413": (refusal(413, "the body has 9 bytes"), ["413", "9 bytes"]),
    "500": (Reply(status=502, body="<h1>Bad gateway</h1>"), ["The server failed (502)"]),
    "503": (refusal(503, "shutting down"), ["503", "shutting down"]),
    "error": (Reply(lambda: iter([{"error": {"message": "out of memory"}}])), ["gave up: out of memory"]),
    "unfinished": (Reply(lambda: iter([]), done=False), ["connection was lost"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_told_and_the_question_stays(browser, stub, case):
    reply, told = REFUSALS[case]
    stub.says(reply, answer("Yes."))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        for part in told:
            expect(page.locator("#problem-text")).to_contain_text(part)
        assert "<" not in page.locator("#problem-text").text_content()
        expect(page.locator("#question")).to_have_value("Why?")
        assert page.locator("#turns li").count() == 0
        page.locator("#question").press("Enter")
        ended(page)
        assert page.locator("#problem-text").text_content() == ""


def test_a_full_server_is_left_alone_for_a_while(browser, stub):
    stub.says(refusal(429, "64 jobs wait already", Retry_After="1"), answer("Yes."))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator("#problem-text")).to_contain_text("64 jobs wait already")
        assert page.locator("#countdown").text_content() == "It may be asked again in 1 s."
        assert page.locator("#countdown").get_attribute("aria-hidden") == "true"
        page.locator("#question").press("Enter")
        assert page.locator("#send").get_attribute("aria-disabled") == "true"
        assert len(stub.requests) == 1
        expect(page.locator("#problem-text")).to_have_text("The server may be asked again.")
        page.locator("#question").press("Enter")
        ended(page)


def test_a_date_to_come_back_is_understood(browser, stub):
    when = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 90))
    stub.says(refusal(429, "full", Retry_After=when))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator("#countdown")).to_have_text(re.compile(r"in [6-9]\d s"))


def test_a_lost_connection_keeps_what_has_come(browser, stub):
    gate = threading.Event()

    def events():
        yield text("It fell be")
        assert gate.wait(PATIENCE_SECONDS)
        raise Lost

    stub.says(Reply(events))
    with visited(browser, stub) as page:
        ask(page, "Why?")
        expect(page.locator(".answer")).to_have_text("It fell be")
        gate.set()
        expect(page.locator("#problem-text")).to_contain_text("connection was lost")
        assert page.locator(".answer").text_content() == "It fell be"
        assert "not complete" in page.locator(".facts").text_content()


def test_a_server_that_is_gone_is_told(browser):
    with stub_server() as stub, window(browser, stub.url) as (page, _, _):
        expect(page.locator("#model")).to_have_text("SmolLM")
        page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
        ask(page, "Why?")
        expect(page.locator("#problem-text")).to_contain_text("cannot be reached")
        expect(page.locator("#question")).to_have_value("Why?")


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, stub):
    stub.key = "sk-1"
    stub.says(answer("Yes."))
    with visited(browser, stub) as page:
        expect(page.locator("#problem-text")).to_contain_text("401")
        expect(page.locator("#key")).to_be_focused()
        page.locator("#key").fill("schlüssel")
        page.locator("#key").blur()
        expect(page.locator("#problem-text")).to_contain_text("ASCII")
        page.locator("#key").fill("sk-1")
        page.locator("#key").blur()
        expect(page.locator("#model")).to_have_text("SmolLM")
        expect(page.locator("#problem-text")).to_have_text("")
        ask(page, "Why?")
        ended(page)
        assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
        page.reload()
        expect(page.locator("#model")).to_have_text("SmolLM")
        assert page.locator("#key").input_value() == "sk-1"
    assert stub.requests[0][1]["Authorization"] == "Bearer sk-1"


# -- for everybody ---------------------------------------------------------------------------------


def test_texts_are_shown_as_they_are(browser, stub):
    stub.models = {HOSTILE: HOSTILE}

    def events():
        yield prompt(HOSTILE, "<script>", "window.ran = 1", "</script>")
        yield depths([30, 30, 9, 0])
        yield text(HOSTILE, "stop")
        yield usage()

    stub.says(Reply(events), refusal(400, HOSTILE))
    with visited(browser, stub) as page:
        page.locator("#files").set_input_files([{"name": "<b>.txt", "mimeType": "", "buffer": HOSTILE.encode()}])
        ask(page, HOSTILE)
        ended(page)
        assert page.locator(".question").text_content() == seen(HOSTILE.strip())
        assert page.locator(".answer").text_content() == seen(HOSTILE)
        assert page.locator("#text").text_content() == seen(HOSTILE) + "<script>window.ran = 1</script>"
        assert page.locator("#documents .name").text_content() == "<b>.txt"
        assert page.locator("#model").text_content() == seen(HOSTILE)
        ask(page, "Why?")
        expect(page.locator("#problem-text")).to_contain_text("<script>window.ran = 1</script>")
        assert page.locator("#text script, #turns script, #problem script, .block b").count() == 0


def test_the_keyboard_is_enough(browser, stub):
    stub.says(traced())
    with visited(browser, stub) as page:
        page.keyboard.press("Tab")
        expect(page.locator(".skip")).to_be_in_viewport()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        order = []
        for _ in range(14):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        wanted = ["theme", "policy", "fresh", "SUMMARY", "paste", "add", "choose", "question", "send"]
        assert [name for name in order if name in wanted][: len(wanted)] == wanted
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#question")).to_be_focused()
        page.keyboard.type("One")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two?")
        page.keyboard.press("Enter")
        ended(page)
        expect(page.locator("#question")).to_be_focused()
        page.get_by_label("all of it").focus()
        page.keyboard.press("ArrowDown")
        assert page.locator("#text").get_attribute("data-show") == "deep"
        page.keyboard.press("Tab")
        expect(page.locator("#text")).to_be_focused()
    assert stub.bodies[0]["messages"][0]["content"] == "One\ntwo?"


def test_everything_that_is_used_has_a_name(browser, stub):
    with visited(browser, stub) as page:
        page.locator("#settings summary").click()
        for name in ("Policy", "Question", "Max tokens", "Temperature", "API key"):
            assert page.get_by_label(name, exact=True).count() == 1
        named = page.locator("button, select, textarea, input:not([hidden])").evaluate_all(
            "all => all.map((one) => one.ariaLabel || one.textContent.trim() || one.labels.length > 0)"
        )
        assert all(named)


def test_an_answer_is_read_out_once(browser, stub):
    gate = threading.Event()

    def events():
        assert gate.wait(PATIENCE_SECONDS)
        for number in range(60):
            yield text(f"{number} ")
            time.sleep(0.005)
        yield usage()

    stub.says(Reply(events))
    with visited(browser, stub) as page:
        page.evaluate(
            """() => {
              window.said = [];
              const texts = (changes) => changes.map(({ target }) => target.textContent).filter(Boolean);
              const note = (changes) => window.said.push(...texts(changes));
              for (const region of document.querySelectorAll("[role=status], [aria-live]")) {
                new MutationObserver(note).observe(region, { childList: true, characterData: true, subtree: true });
              }
            }"""
        )
        ask(page, "Count")
        gate.set()
        ended(page)
        said = page.evaluate("window.said")
    counted = "".join(f"{number} " for number in range(60))
    assert said == ["reading the prompt…", f"Answer: {counted}"]


@pytest.mark.parametrize("dark", [False, True])
def test_all_of_it_can_be_read(browser, stub, dark):
    reached = list(range(31)) * 2
    stub.says(
        Reply(
            lambda: iter(
                [
                    prompt(*(f" token {depth}" for depth in reached)),
                    depths(reached),
                    depths({1: 30}),
                    text("So."),
                    usage(),
                ]
            )
        ),
        refusal(429, "full", Retry_After="60"),
    )
    with visited(browser, stub, dark=dark) as page:
        assert poor_contrasts(page) == {}
        add(page, "The report.")
        page.get_by_label("Load first").check()
        page.get_by_label("Load first").uncheck()
        page.locator("#settings summary").click()
        ask(page, "Why?")
        ended(page)
        ask(page, "Why?")
        expect(page.locator("#countdown")).to_contain_text("s.")
        assert page.locator("#text .block > *").count() >= 31
        assert poor_contrasts(page) == {}


def test_the_button_changes_the_colours(browser, stub):
    background = "getComputedStyle(document.body).backgroundColor"
    with visited(browser, stub) as page:
        light = page.evaluate(background)
        page.locator("#theme").click()
        assert page.evaluate(background) == light
        page.locator("#theme").click()
        assert page.evaluate(background) != light
        assert page.locator("#theme").get_attribute("aria-label") == "colours: dark"


@pytest.mark.parametrize("width", [360, 800, 1400, 2200])
def test_no_screen_need_scroll_sideways(browser, stub, width):
    long = "incomprehensibilities" * 20
    stub.models = {"A-model-with-quite-a-long-name-1.5B-Instruct": "a-policy-with-a-name-of-its-own"}
    stub.says(Reply(lambda: iter([prompt(long, "\n", *PIECES), depths([30, 0, *REACHED]), text(long), usage()])))
    stub.says(refusal(400, long))
    with visited(browser, stub, width=width) as page:
        page.locator("#files").set_input_files([{"name": f"{long}.txt", "mimeType": "", "buffer": b"text"}])
        page.locator("#settings summary").click()
        ask(page, long)
        ended(page)
        ask(page, "Why?")
        expect(page.locator("#problem-text")).to_contain_text(long)
        assert not overflows(page)
        for part in ("#talk", "#reading"):
            assert page.locator(part).evaluate("part => part.scrollWidth <= part.clientWidth"), part


@pytest.mark.parametrize("width", [360, 1400])
def test_the_end_of_a_long_answer_stays_in_sight(browser, stub, width):
    stub.says(answer(*(f"Line {number}.\n" for number in range(120))))
    with visited(browser, stub, width=width) as page:
        add(page, "The report.")
        ask(page, "Why?")
        ended(page)
        facts, field = page.locator(".facts").bounding_box(), page.locator("#ask").bounding_box()
        assert 0 < facts["y"] + facts["height"] <= field["y"] + 1
        assert field["y"] + field["height"] <= 801
        assert (page.locator("#texts").get_attribute("open") is None) == (width == 360)


def test_it_wears_the_colours_of_the_other_pages():
    def colours(sheet: str) -> dict[str, str]:
        return dict(re.findall(r"(--[\w-]+): ([^;]+);", sheet))

    others = colours(asset("common.css") + asset("inspect.css"))
    own = colours((PAGE / "page.css").read_text(encoding="utf-8"))
    shared = own.keys() & others.keys()
    assert len(shared) >= 15
    assert {name: own[name] for name in shared} == {name: others[name] for name in shared}


def test_a_texts_way_to_the_page_is_never_markup():
    scripts = "".join(file.read_text(encoding="utf-8") for file in PAGE.iterdir() if file.name.endswith(".js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", scripts)
