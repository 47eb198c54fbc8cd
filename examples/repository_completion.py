"""The next lines of a file, written with the other files of its repository as context.

    python examples/repository_completion.py
    python examples/repository_completion.py REPOSITORY --file src/app.py --line 40

The other files stand before the file, those that share most lines with it nearest. A model then sees how its
neighbours are written, at the price of a long prompt. Three ways are compared: the file alone, all files with every
token computed, and all files with the tokens that matter for the next line. Without a repository it completes a file of
lazyllm itself. Needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

import lazyllm
from lazyllm import GenerationResult, LazyPipeline
from lazyllm.evaluation.data import packaged_model, quiet_loading

OWN = Path(lazyllm.__file__).parent / "policies" / "schedules"
CURSOR_LINES = 4
"""How many lines before the cursor say what is looked for."""
TOKENS_PER_LINE = 28


def main(
    repository: Annotated[Path, typer.Argument(help="Folder of source files.")] = OWN,
    file: Annotated[str, typer.Option(help="The file to complete, inside the repository.")] = "cosine.py",
    line: Annotated[int, typer.Option(min=2, help="The first line to write; those from here on are hidden.")] = 24,
    lines: Annotated[int, typer.Option(min=1, help="How many lines to write.")] = 2,
    context_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of other files.")] = 3000,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
) -> None:
    written = (repository / file).read_text(encoding="utf-8").splitlines(keepends=True)
    head, truth = written[: line - 1], [one.rstrip() for one in written[line - 1 : line - 1 + lines]]
    if not truth:
        raise typer.BadParameter(f"{file} has {len(written)} lines, there is no line {line} to write")
    with quiet_loading():
        pipe = LazyPipeline.from_pretrained(model or packaged_model(), dtype="float32", preset=preset)
    dense = LazyPipeline.from_preset("dense", pipe.model, pipe.tokenizer)
    cursor = "".join(head[-CURSOR_LINES:]).rstrip("\n")  # a model takes the break and the indent behind it as one token
    alone = f"# {file}\n{''.join(head)}".rstrip("\n")
    whole = neighbours(pipe, repository, file, head, context_tokens) + alone
    print(f"{file}, up to line {line}:\n\n{cursor}", *(f"\n{one}   <- hidden" for one in truth), sep="")
    dense.generate(alone, max_new_tokens=1)  # the first run pays for things that no later one does
    complete("the file alone", dense, alone, cursor, truth)
    complete("with its repository, dense", dense, whole, cursor, truth)
    complete(f"with its repository, {preset}", pipe, whole, cursor, truth)


def neighbours(pipe: LazyPipeline, repository: Path, file: str, head: list[str], most_tokens: int) -> str:
    """Other files of the same kind, as many as there is room for, those most like `head` last."""
    kind, own, chosen = Path(file).suffix, {one.strip() for one in head}, list[str]()
    paths = [path for path in sorted(repository.rglob(f"*{kind}")) if path != repository / file]
    texts = {str(path.relative_to(repository)): path.read_text(encoding="utf-8") for path in paths}
    likeness = {name: len(own & {one.strip() for one in text.splitlines()}) for name, text in texts.items()}
    for name in sorted(texts, key=lambda name: -likeness[name]):
        piece = f"# {name}\n{texts[name]}\n"
        most_tokens -= len(pipe.encode(piece).token_ids)
        if most_tokens < 0:
            break
        chosen.append(piece)
    return "".join(reversed(chosen))


def complete(name: str, pipe: LazyPipeline, prompt: str, cursor: str, truth: list[str]) -> None:
    """Writes as many lines as were hidden, and says how many of them are right."""
    room = TOKENS_PER_LINE * len(truth)
    reply = cast(GenerationResult, pipe.generate(prompt, query=cursor, max_new_tokens=room, do_sample=False))
    guess = [one.rstrip() for one in reply.text.removeprefix("\n").splitlines()[: len(truth)]]
    right = sum(one == other for one, other in zip(guess, truth, strict=False))
    stats = reply.stats
    print(
        f"\n{name}: {stats.prompt_tokens:,} tokens, first token after {stats.ttft_seconds:.2f} s, "
        f"{stats.prefill_computed_fraction:.0%} computed, {right} of {len(truth)} lines right"
    )
    print(*guess, sep="\n")


if __name__ == "__main__":
    typer.run(main)
