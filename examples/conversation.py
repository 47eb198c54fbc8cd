"""A conversation about a long speech that turns back to a part it had skipped; then undo, fork, save.

    python examples/conversation.py
    python examples/conversation.py --document report.txt --question "..." --question "..."

A conversation keeps one cache over its turns. What an earlier question did not need waits where it stopped; a later one
takes it up from there, and computes nothing twice. Without a document it talks about an address of 1985. Needs no
network.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from lazyllm import Conversation, LazyPipeline
from lazyllm.evaluation.data import packaged_model, packaged_speech, quiet_loading

SPEECH = "1985-Reagan-1"
QUESTIONS = [
    "What is the name of the young woman who will graduate from West Point?",
    "How much do taxpayers pay per passenger on Amtrak?",
]
OTHER = "Who is the Treasury Secretary?"


def main(
    document: Annotated[Path | None, typer.Option(help="A text file; an address of 1985 without it.")] = None,
    question: Annotated[list[str], typer.Option(help="What to ask, in turn; may be repeated.")] = QUESTIONS,
    other: Annotated[str, typer.Option(help="What the fork asks instead of the last question.")] = OTHER,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 24,
) -> None:
    text = packaged_speech(SPEECH) if document is None else document.read_text(encoding="utf-8")
    with quiet_loading():
        pipe = LazyPipeline.from_pretrained(model or packaged_model(), dtype="float32", preset=preset)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    chat = pipe.conversation(documents=text, system="You answer questions about a speech, briefly.")
    for asked in question:
        chat.ask(asked, **options)
        show(chat)

    branch = chat.fork()  # shares its memory until one of both goes on
    removed, _ = branch.undo()
    print(f"A fork takes back {removed['content']!r} and asks another question.\n")
    branch.ask(other, **options)
    show(branch)
    print(f"The conversation it was forked from still has {len(chat.turns)} turns.\n")

    with TemporaryDirectory() as folder:
        path = chat.save(Path(folder) / "talk.safetensors")
        again = pipe.load_conversation(path)
        size = path.stat().st_size / 1e6
        print(f"Saved and loaded: {size:.0f} MB, {len(again.turns)} turns. Both are asked once more.\n")
        for talk in (chat, again):
            talk.ask(question[0], **options)
            show(talk)


def show(chat: Conversation) -> None:
    """The last turn: what was said, and what it has cost."""
    turn = chat.turns[-1]
    stats, depth = turn.stats, chat.cache.rows[0].ledger.depth.double()
    print(f"> {turn.asked['content']}\n{turn.reply['content'].strip()}")
    print(
        f"  first token after {stats.ttft_seconds:.2f} s; {stats.reused_tokens:,} of {stats.prompt_tokens:,} tokens "
        f"were there, {stats.revived_tokens:,} layer-tokens revived; {depth.mean() / stats.layers:.0%} computed\n"
    )


if __name__ == "__main__":
    typer.run(main)
