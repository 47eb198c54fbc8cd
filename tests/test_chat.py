"""`lazyllm chat`: lines in, replies out; commands, Ctrl-C, pipes and a real terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from lazyllm import CacheError, InputError, LazyPipeline
from lazyllm.cli.chat import COMMANDS, Chat, NamedText, read_documents, run_chat
from lazyllm.cli.main import app
from lazyllm.cli.terminal import LiveLine, Wrapped, printable
from tests.talks import DOCUMENT, GREEDY, TURNS, pipeline, tokenizer
from tests.tiny import tiny_model


def opened(**options) -> Chat:
    """A chat whose replies and notes are kept as texts."""
    chat = pipeline().conversation(documents=DOCUMENT, **options)
    notes = Console(file=io.StringIO(), width=100)
    return Chat(chat, documents=[NamedText("words.txt", DOCUMENT)], options=GREEDY, out=io.StringIO(), notes=notes)


def said(chat: Chat) -> str:
    return chat._out.getvalue()


def noted(chat: Chat) -> str:
    return chat._notes.file.getvalue()


# -- questions and commands --------------------------------------------------------------------------


def test_a_line_is_a_question_and_its_reply_goes_out():
    chat = opened()
    assert chat.take("w1 w2 ?")
    assert said(chat) == chat.chat.turns[0].reply["content"] + "\n"
    assert re.search(r"TTFT \d+\.\d\d s, computed \d+\.\d%, revived \d+, reused 0 of 48 tokens", noted(chat))
    assert chat.take("  ")
    assert len(chat.chat.turns) == 1
    chat.take("//w1 ?")
    assert chat.chat.turns[1].asked["content"] == "/w1 ?"


def test_undo_and_help_and_docs_and_quit():
    chat = opened()
    chat.take("w1 ?")
    chat.take("/undo")
    assert not chat.chat.turns
    assert "taken back: w1 ?" in noted(chat)
    chat.take("/help")
    assert all(f"/{name}" in noted(chat) for name in COMMANDS)
    chat.take("/docs")
    assert f"words.txt: {len(DOCUMENT)} characters" in noted(chat)
    assert not chat.take("/quit")


def test_forks_have_names_and_one_may_go_back():
    chat = opened()
    chat.take("w1 ?")
    assert chat.prompt == "> "
    chat.take("/fork")
    chat.take("w2 ?")
    assert (chat.prompt, len(chat.chat.turns)) == ("copy1> ", 2)
    chat.take("/go main")
    assert (chat.prompt, len(chat.chat.turns)) == ("main> ", 1)
    chat.take("/fork second")
    chat.take("/go")
    assert "  main: 1 turn\n  copy1: 2 turns\n* second: 1 turn\n" in noted(chat)


def test_stats_have_a_row_for_every_turn():
    chat = opened()
    for text in ("w1 ?", "w2 ?"):
        chat.take(text)
    chat.take("/stats")
    rows = re.findall(r"^ *(\d) +(\d+) +(\d+) +\d+\.\d% +\d+ +\d+\.\d\d *$", noted(chat), re.MULTILINE)
    turns = chat.chat.turns
    assert rows == [
        (str(number), str(turn.stats.prompt_tokens), str(turn.stats.reused_tokens))
        for number, turn in enumerate(turns, start=1)
    ]
    assert f"{chat.chat.cache.columns} tokens held" in noted(chat)


def test_a_saved_conversation_is_loaded_again(tmp_path):
    chat = opened()
    chat.take("w1 ?")
    chat.take(f"/save {tmp_path / 'a chat'}")
    assert f"saved as {tmp_path / 'a chat'}" in noted(chat).replace("\n", "")
    loaded = Chat(pipeline().load_conversation(tmp_path / "a chat"), notes=chat._notes)
    loaded.take("/docs")
    assert f"documents of {len(DOCUMENT) + 2} characters" in noted(chat)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/udno", "Did you mean 'undo'"),
        ("/", "unknown command ''"),
        ("/undo", "no turn to take back"),
        ("/save", "takes the path of a file"),
        ("/save /nowhere/at/all", "cannot be saved as"),
        ("/go elsewhere", "unknown conversation 'elsewhere'"),
        ("/fork main", "there is a conversation 'main' already"),
        ("w1 " * 300, "context is full"),
    ],
    ids=lambda value: value[:12],
)
def test_what_cannot_be_done_is_said_and_costs_its_line_alone(line: str, message: str):
    chat = opened()
    with pytest.raises((InputError, CacheError), match=message):
        chat.take(line)
    lines = iter([line, "w1 ?", None])
    chat.talk(lambda prompt: next(lines))
    assert "lazyllm: " in noted(chat)
    assert len(chat.chat.turns) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
def test_memory_that_runs_out_costs_its_turn_alone(monkeypatch, error: Exception):
    chat = opened()
    chat.take("w1 ?")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(chat.chat._pipe, "reply", fail)
    chat.talk(script("w2 ?", None))
    assert "lazyllm: there is not enough memory for this turn" in noted(chat)
    assert len(chat.chat.turns) == 1
    monkeypatch.undo()
    chat.take("w2 ?")
    assert len(chat.chat.turns) == 2


def test_other_faults_of_the_program_are_not_hidden(monkeypatch):
    chat = opened()

    def fail(*_, **__):
        raise RuntimeError("a fault")

    monkeypatch.setattr(chat.chat._pipe, "reply", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        chat.talk(script("w2 ?", None))


def test_text_that_is_no_unicode_is_asked_all_the_same():
    chat = opened()
    chat.take("w1 \udcff w2 ?")
    assert chat.chat.turns[0].asked["content"] == "w1 ? w2 ?"


# -- Ctrl-C ------------------------------------------------------------------------------------------


def script(*lines):
    """Reads lines; an exception among them is raised."""
    left = iter(lines)

    def read(prompt: str) -> str | None:
        line = next(left)
        if isinstance(line, BaseException):
            raise line
        return line

    return read


def test_ctrl_c_at_the_prompt_leaves_at_the_second_time():
    chat = opened()
    chat.talk(script(KeyboardInterrupt(), "w1 ?", KeyboardInterrupt(), KeyboardInterrupt()))
    assert len(chat.chat.turns) == 1
    assert noted(chat).count("Ctrl-C again, or Ctrl-D, leaves") == 2


def test_ctrl_c_stops_a_reply_and_keeps_what_there_is(monkeypatch):
    chat = opened()
    written = []

    def interrupt(self, piece: str) -> None:
        written.append(piece)
        raise KeyboardInterrupt

    chat._options = {**GREEDY, "max_new_tokens": 100}
    with monkeypatch.context() as patch:
        patch.setattr(Wrapped, "write", interrupt)
        chat.take("w1 ?")
    assert written
    assert 1 <= chat.chat.turns[0].stats.new_tokens <= 100
    chat.take("w2 ?")
    assert len(chat.chat.turns) == 2


def test_ctrl_c_before_the_reply_takes_the_question_back(monkeypatch):
    chat = opened()
    stream_of = type(chat.chat).stream

    def closed(self, text, **options):
        stream = stream_of(self, text, **options)
        stream.close()

        class Interrupted:
            close = stream.close

            def __iter__(self):
                raise KeyboardInterrupt

        return Interrupted()

    class Slow(LiveLine):
        def on_layer_end(self, event):
            time.sleep(0.2)

    monkeypatch.setattr("lazyllm.cli.chat.LiveLine", Slow)
    monkeypatch.setattr(type(chat.chat), "stream", closed)
    chat.take("w1 ?")
    assert not chat.chat.turns
    assert "the question is taken back" in noted(chat)


# -- writing -----------------------------------------------------------------------------------------


@given(st.text("ab \n", max_size=60), st.integers(3, 12), st.data())
def test_wrapped_text_fits_and_loses_nothing_but_space(text, width, data):
    out = io.StringIO()
    writer = Wrapped(out, width)
    words = re.findall(r"\s*\S+\s*|\s+", text)
    while words:
        count = data.draw(st.integers(1, len(words)))
        writer.write("".join(words[:count]))
        words = words[count:]
    assert out.getvalue().split() == text.split()
    for line in out.getvalue().split("\n"):
        assert len(line) <= width or " " not in line.strip()


def test_without_a_terminal_text_is_left_as_it_is():
    out = io.StringIO()
    writer = Wrapped(out, None)
    text = "a long line " * 30 + "\n\n  and  more"
    for piece in re.findall(r".{1,7}", text, re.DOTALL):
        writer.write(piece)
    writer.end()
    assert out.getvalue() == text + "\n"


def test_what_would_control_the_terminal_is_not_written():
    assert printable("a\x1b[31mb\x07\r\n\tc\x9bd") == "a[31mb\n\tcd"


# -- documents ---------------------------------------------------------------------------------------


def test_documents_come_from_files_and_folders_in_order(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, text in {"b.txt": "w2\n", "a.md": " w1", "inner/c.txt": "w3", ".hidden": "w4"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    left_out: list[str] = []
    texts = read_documents([tmp_path / "b.txt", tmp_path], left_out=left_out.append)
    assert [(text.name, text.text) for text in texts] == [
        ("b.txt", "w2"), ("a.md", "w1"), ("b.txt", "w2"), ("inner/c.txt", "w3"),
    ]  # fmt: skip
    assert texts[0].titled == "b.txt:\n\nw2"
    assert len(left_out) == 1
    assert "picture.png" in left_out[0]


@pytest.mark.parametrize(
    ("what", "message"), [("missing", "No such file"), ("binary", "UTF-8"), ("folder", "no text file")]
)
def test_documents_that_cannot_be(what: str, message: str, tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=message):
        read_documents([tmp_path / what], left_out=print)


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer as one would find them on disk."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    tokenizer(TURNS).save_pretrained(path)
    (path / "words.txt").write_text(DOCUMENT)
    return path


@pytest.fixture
def chat(folder: Path, monkeypatch):
    """Runs `lazyllm chat ...` with something on stdin."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(stdin: str | bytes, *arguments: object):
        options = ["--model", str(folder), "--max-new-tokens", "4", "--preset", "dense", *map(str, arguments)]
        return CliRunner().invoke(app, ["chat", *options], input=stdin)

    return run


def test_a_pipe_is_answered_line_by_line_in_plain_text(chat, folder: Path):
    result = chat("w1 w2 ?\n\nw3 ?\n/quit\nw4 ?\n", "--document", folder / "words.txt", "--system", "w60")
    assert result.exit_code == 0, result.stderr
    twin = LazyPipeline.from_preset("dense", tiny_model(), tokenizer())
    expected = twin.conversation(documents=f"words.txt:\n\n{DOCUMENT}", system="w60")
    replies = [expected.ask(text, max_new_tokens=4, do_sample=False).text for text in ("w1 w2 ?", "w3 ?")]
    assert result.stdout == "".join(f"{reply}\n" for reply in replies)
    assert "\x1b" not in result.stdout + result.stderr
    assert result.stderr.count("TTFT") == 2


def test_documents_of_a_cache_that_revives_are_loaded_before_the_first_question(chat, folder: Path):
    reused = {}
    for cache in ("AuxCache", "DropCache"):
        options = ["--preset", "paper", "--cache", cache, "--scorer", "Random", "--schedule", "Stages({1: 0.5})"]
        result = chat("w1 ?\n", "--document", folder / "words.txt", *options)
        assert result.exit_code == 0, result.stderr
        reused[cache] = int(re.search(r"reused (\d+) of", result.stderr)[1])
    assert reused["AuxCache"] > 40
    assert reused["DropCache"] == 0


def test_a_pipe_ends_at_the_first_error(chat):
    result = chat("w1 ?\n/undo\n/undo\nw2 ?\n")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "lazyllm: there is no turn to take back"
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "arguments", "message"),
    [
        ("", [], "stdin is empty"),
        ("\n \n", [], "stdin is empty"),
        (b"\xff\xfe\n", [], "not UTF-8"),
        ("w1 ?", ["--document", "missing.txt"], "No such file"),
        ("w1 ?", ["--load", "missing"], "no saved cache"),
        ("w1 ?", ["--load", "missing", "--system", "w1"], "leave them out"),
        ("w1 " * 300, ["--no-slide"], "overflow='slide'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(chat, stdin, arguments, message: str):
    result = chat(stdin, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr.splitlines()[-1]


def test_a_conversation_goes_on_in_another_process(chat, tmp_path):
    first = chat(f"w1 ?\n/save {tmp_path / 'talk'}\nw2 ?\n")
    second = chat("w2 ?\n", "--load", tmp_path / "talk")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert second.stdout == first.stdout.splitlines()[1] + "\n"


class Terminal:
    """`lazyllm chat` in a terminal of 40 columns."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "lazyllm", "chat", "--model", str(folder), *arguments]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "40", "LINES": "30", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True,
            preexec_fn=self.own_terminal,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    @staticmethod
    def own_terminal() -> None:
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background may have Ctrl-C ignored

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def wait(self, pattern: str, seconds: float = 120) -> None:
        """Reads until the pattern comes, and forgets everything up to it."""
        assert self.comes(pattern, seconds), f"{pattern!r} did not come; there is {self.seen!r}"

    def comes(self, pattern: str, seconds: float) -> bool:
        """As `wait`, and whether it comes in time."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            if not ready:
                return False
            self.seen += os.read(self.ours, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return True

    def interrupt(self, pattern: str) -> None:
        """Presses Ctrl-C until the pattern comes; readline misses one between its prompt and its wait for keys."""
        for _ in range(6):
            self.type("\x03")
            if self.comes(pattern, 10):
                return
        raise AssertionError(f"{pattern!r} did not come; there is {self.seen!r}")

    def end(self) -> None:
        """Ends the process, however it is."""
        self.process.kill()
        self.process.wait()
        os.close(self.ours)


def test_in_a_terminal(folder: Path):
    terminal = Terminal(folder, "--max-new-tokens", "150", "--document", str(folder / "words.txt"))
    try:
        terminal.wait("> ")
        terminal.type("w1 w2 ?\n")
        terminal.wait(r"TTFT \d")
        terminal.wait("> ")
        terminal.type("/undo\n")
        terminal.wait(r"taken back: w1 w2 \?")
        terminal.wait("> ")
        terminal.interrupt("Ctrl-C again, or Ctrl-D, leaves")
        terminal.wait("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.end()


def test_run_chat_takes_the_keyboard_where_there_is_one(monkeypatch):
    chat = opened()
    monkeypatch.setattr("sys.stdin", type("Keyboard", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("lazyllm.cli.chat.typed", script("w1 ?", None))
    run_chat(chat)
    assert len(chat.chat.turns) == 1
