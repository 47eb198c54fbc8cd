"""Questions about a folder of text files, which is loaded once and asked many times.

    python examples/folder_questions.py
    python examples/folder_questions.py notes/ --question "Who signed?" --question "When?" --save notes.safetensors
    python examples/folder_questions.py notes/ --saved notes.safetensors --question "Where?"

Loading takes all texts through the first layers only, as far as the scorer needs to see them, and can be kept in a
file. A question then takes deeper what it needs, and what it has computed is there for the next one. Without a folder
it asks about three short presidential messages of 1973. Needs no network.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, cast

import typer

from lazyllm import Document, GenerationResult, LazyPipeline
from lazyllm.evaluation.data import packaged_model, packaged_speech, quiet_loading

MESSAGES = ("1973-Nixon-2", "1973-Nixon-6", "1973-Nixon-8")
QUESTIONS = [
    "How much funding is proposed for human resources programs in the new budget?",
    "By how many percent did crime increase from 1960 to 1968?",
    "By how many percent did industrial spending for pollution control jump?",
]


def main(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of .txt and .md files; three messages without it.")
    ] = None,
    question: Annotated[list[str], typer.Option(help="What to ask; may be repeated.")] = QUESTIONS,
    save: Annotated[Path | None, typer.Option(help="Keep the loaded folder in this file.")] = None,
    saved: Annotated[Path | None, typer.Option(help="Open what --save wrote instead of reading the folder.")] = None,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
) -> None:
    with quiet_loading():
        pipe = LazyPipeline.from_pretrained(model or packaged_model(), dtype="float32", preset=preset)
    with TemporaryDirectory() as scratch:
        path = saved or loaded(pipe, folder, save or Path(scratch) / "folder.safetensors")
        document = opened(pipe, path)
        for asked in question:
            answer(document, asked, max_new_tokens)


def loaded(pipe: LazyPipeline, folder: Path | None, path: Path) -> Path:
    """Loads the texts, and keeps them in a file."""
    texts = texts_of(folder) if folder is not None else {name: packaged_speech(name) for name in MESSAGES}
    document = pipe.load([f"{name}:\n\n{text}" for name, text in texts.items()])
    stats = document.loaded
    assert stats is not None  # it was neither opened nor joined
    document.save(path)
    print(
        f"Loaded {len(texts)} texts, {stats.tokens:,} tokens, in {stats.seconds:.2f} s: {stats.depth} of "
        f"{stats.layers} layers, {path.stat().st_size / 1e6:.0f} MB"
    )
    return path


def opened(pipe: LazyPipeline, path: Path) -> Document:
    """The texts as they were when they were saved; the file is read as it is needed."""
    began = time.perf_counter()
    document = pipe.open(path)
    print(f"Opened {len(document):,} tokens from {path.name} in {time.perf_counter() - began:.2f} s\n")
    return document


def texts_of(folder: Path) -> dict[str, str]:
    """Text files by name, those that are blank left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
    texts = {str(path.relative_to(folder)): path.read_text(encoding="utf-8").strip() for path in paths}
    if not any(texts.values()):
        raise typer.BadParameter(f"{folder} holds no .txt or .md file with text in it")
    return {name: text for name, text in texts.items() if text}


def answer(document: Document, question: str, max_new_tokens: int) -> None:
    reply = cast(GenerationResult, document.ask(question, max_new_tokens=max_new_tokens, do_sample=False))
    print(f"> {question}\n{reply.text.strip()}")
    print(
        f"  first token after {reply.stats.ttft_seconds:.2f} s; so far {document.computed_fraction:.0%} of a dense "
        "prefill is computed\n"
    )


if __name__ == "__main__":
    typer.run(main)
