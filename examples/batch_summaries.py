"""Summaries of many texts, written to a file that the same command goes on from.

    python examples/batch_summaries.py
    python examples/batch_summaries.py notes/ --out out/notes.jsonl

`pipe.map` answers prompts of like length together, and every reply is on disk before it is handed over. Stop the
command with Ctrl-C, or end it, and run it again: what stands in the file is not computed again, and with more texts
only these are. Without a folder it takes the shortest presidential addresses. Needs no network.
"""

from __future__ import annotations

import time
from pathlib import Path
from textwrap import indent
from typing import Annotated

import typer

from lazyllm import LazyPipeline
from lazyllm.evaluation.data import packaged_model, packaged_speech, packaged_speech_names, quiet_loading

TASK = "Summarise this text in two short sentences."


def main(
    folder: Annotated[Path | None, typer.Argument(help="Folder of .txt files; packaged addresses without it.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many texts to summarise.")] = 6,
    out: Annotated[Path, typer.Option(help="The file of replies, one JSON line each.")] = Path("out/summaries.jsonl"),
    task: Annotated[str, typer.Option(help="What is asked of each text.")] = TASK,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most prompt tokens of a batch.")] = 8192,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest summary.")] = 48,
) -> None:
    named = dict(list(texts_of(folder).items())[:texts])
    with quiet_loading():
        pipe = LazyPipeline.from_pretrained(model or packaged_model(), dtype="float32", preset=preset)
    prompts = [[{"role": "user", "content": f"{text}\n\n{task}"}] for text in named.values()]
    out.parent.mkdir(parents=True, exist_ok=True)
    known, began = lines_in(out), time.perf_counter()
    replies = pipe.map(prompts, out=out, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens, do_sample=False)
    for name, reply in zip(named, replies, strict=True):
        print(f"{name}: {reply.prompt_tokens:,} tokens, {reply.computed_fraction:.0%} computed")
        print(indent(reply.text.strip(), "  "))
    new = lines_in(out) - known
    print(f"\n{len(named)} summaries in {out}: {new} made in {time.perf_counter() - began:.1f} s, ", end="")
    print(f"{len(named) - new} were there already.")


def texts_of(folder: Path | None) -> dict[str, str]:
    """Texts by name: those of a folder, or the packaged addresses from the shortest on."""
    if folder is None:
        return dict(sorted(((name, packaged_speech(name)) for name in packaged_speech_names()), key=length))
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    if not texts:
        raise typer.BadParameter(f"{folder} holds no .txt file")
    return texts


def length(named: tuple[str, str]) -> int:
    return len(named[1])


def lines_in(path: Path) -> int:
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    typer.run(main)
