"""Where pruning ends to pay, and what it must not cost, on the packaged model or another.

    python benchmarks/limits.py --parts growth,batch,memory,revival --dtypes float32,bfloat16 --rounds 5
    python benchmarks/limits.py --quick

growth   time per prompt token, by prompt length
batch    prompts of different lengths, against the padded batch of the unmodified model
memory   bytes of K/V and Aux Cache, counted and seen in a fresh process; their growth during a long reply
revival  a prompt pruned whole in prefill and revived whole in decode

Prompts are the beginning of State of the Union addresses with a question behind them. Writes out/limits.json,
out/limits.md and out/limits-*.png, anew after every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from lazyllm.config import LazyConfig
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation import limits
from lazyllm.evaluation.bench import environment
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.limits import Entry, Part, Setup
from lazyllm.evaluation.memory import Footprint, measure_in_fresh_process
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.plots import plot_growth, plot_reply_sizes
from lazyllm.evaluation.sections import command_line
from lazyllm.models.loading import DTYPES, dtype_named, load_model
from lazyllm.policies.query import TokenRange

PARTS = ("growth", "batch", "memory", "revival")
QUESTION = "\n\nWhat did the president say about taxes?\n"


@dataclass(frozen=True)
class Sizes:
    lengths: list[int]
    rows: int
    shortest: int
    longest: int
    tokens: int
    reply: int
    long_reply: int


QUICK = Sizes(lengths=[256, 512], rows=3, shortest=50, longest=300, tokens=512, reply=4, long_reply=20)

console = Console(width=None if Console().is_terminal else 160)


def main(
    parts: Annotated[str, typer.Option(help="Which of " + ", ".join(PARTS))] = ",".join(PARTS),
    dtypes: Annotated[str, typer.Option(help="Dtypes of the weights.")] = "float32",
    lengths: Annotated[str, typer.Option(help="growth: prompt lengths in tokens.")] = "1024,2048,4096,8192,16384",
    rows: Annotated[int, typer.Option(min=1, help="batch: number of prompts.")] = 8,
    shortest: Annotated[int, typer.Option(min=1, help="batch: least length.")] = 200,
    longest: Annotated[int, typer.Option(min=1, help="batch: greatest length.")] = 4000,
    tokens: Annotated[int, typer.Option(min=1, help="memory, revival: prompt length.")] = 4096,
    reply: Annotated[int, typer.Option(min=2, help="memory, revival: length of the reply.")] = 16,
    long_reply: Annotated[int, typer.Option(min=1, help="memory: length of the long reply.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of everything, after one to warm up.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes and one round, to see that all works.")] = False,
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and PNG.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the order within a round and of the batch's lengths.")] = 0,
) -> None:
    try:
        chosen, kinds = names_in(parts, known=PARTS), names_in(dtypes, known=DTYPES)
        asked = Sizes(numbers_in(lengths), rows, shortest, longest, tokens, reply, long_reply)
        sizes, rounds = (QUICK, 1) if quick else (asked, rounds)
        source = model or str(packaged_model())
        sections: list[Part] = []
        grown: list[Entry] = []
        for kind in kinds:
            setup = _setup(source, kind, device, rounds, seed, sizes)
            for part in chosen:
                for section in _sections(part, setup, source, sizes, grown, out):
                    sections.append(section)
                    console.print(Markdown(section.markdown()))
                    limits.save_sections(sections, out, environment=environment(setup.model))
        console.print("written:", *sorted(out.glob("limits*")))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def _setup(source: str, dtype: str, device: str, rounds: int, seed: int, sizes: Sizes) -> Setup:
    with console.status(f"loading {Path(source).name} in {dtype}"), quiet_loading():
        network, tokenizer = load_model(source, dtype=dtype_named(dtype))
    return Setup(
        model=network.to(device),
        name=Path(source).name,
        text=packaged_text(tokenizer, max(*sizes.lengths, 2 * sizes.longest, sizes.tokens)),
        question=tokenizer(QUESTION, add_special_tokens=False)["input_ids"],
        rounds=rounds,
        command=command_line(),
        seed=seed,
        on_round=lambda length, number: console.print(f"{dtype}, {length:,} tokens, round {number}", style="dim"),
    )


def _sections(part: str, setup: Setup, source: str, sizes: Sizes, grown: list[Entry], out: Path) -> Iterator[Part]:
    if part == "growth":
        section, entries = limits.growth(setup, sizes.lengths)
        grown += entries
        plot_growth(grown, out / "limits-growth.png")
        yield section
    elif part == "batch":
        yield limits.batch(setup, sizes.rows, sizes.shortest, sizes.longest)
    elif part == "memory":
        yield limits.memory(setup, sizes.tokens, partial(_measure, source, setup, sizes.reply))
        section, held = limits.long_reply(setup, sizes.tokens, sizes.long_reply)
        plot_reply_sizes(held, out / f"limits-reply-{setup.dtype}.png")
        yield section
    else:
        yield limits.revival(setup, sizes.tokens, sizes.reply)


def _measure(
    source: str, setup: Setup, reply: int, config: LazyConfig, prompt: list[int], question: TokenRange
) -> Footprint:
    with console.status("measuring in a process of its own"):
        return measure_in_fresh_process(source, setup.dtype, str(setup.model.device), config, prompt, question, reply)


if __name__ == "__main__":
    typer.run(main)
