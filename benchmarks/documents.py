"""What a document costs that waits for questions, and what the questions cost, beside a dense prefill that is kept.

    python benchmarks/documents.py --lengths 2048,6000 --questions 4 --rounds 5

Without --model it measures the packaged SmolLM2-135M-Instruct; the document is the beginning of State of the Union
addresses, and the questions are about different parts of it. In every round the unmodified model and each preset load
the document and answer all questions, in an order drawn anew. Writes out/documents.md.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from transformers import DynamicCache

from lazyllm import Document, LazyPipeline
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import environment
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.sections import Section, command_line, conditions, save_page
from lazyllm.models.loading import dtype_named, load_model

console = Console(width=None if Console().is_terminal else 160)
QUESTIONS = [
    "What does the speech say about taxes?",
    "What does the speech say about schools?",
    "Which country is named most often?",
    "What is asked of the Congress?",
    "What is said about the deficit?",
    "Whom does the speaker thank?",
]


@dataclass
class Times:
    """Seconds of loading and of the first token to each question, by round, and bytes per token after loading."""

    load: list[float] = field(default_factory=list)
    questions: list[list[float]] = field(default_factory=list)
    bytes_per_token: float = 0.0
    computed: float = 1.0


def main(
    lengths: Annotated[str, typer.Option(help="Lengths of the document in tokens.")] = "2048,6000",
    questions: Annotated[int, typer.Option(min=1, max=len(QUESTIONS), help="How many questions.")] = 4,
    presets: Annotated[str, typer.Option(help="Presets beside the unmodified model.")] = "recommended",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 5,
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the table.")] = Path("out"),
) -> None:
    try:
        source = model or str(packaged_model())
        with console.status(f"loading {Path(source).name}"), quiet_loading():
            network, tokenizer = load_model(source, dtype=dtype_named(dtype))
            network = network.to(device)
        pipes = {name: LazyPipeline.from_preset(name, network, tokenizer) for name in names_in(presets)}
        said = conditions(
            Path(source).stem,
            dtype,
            environment(network),
            {},
            tokens=f"documents of {lengths} tokens, {questions} questions, replies of one token",
            baseline="transformers, sdpa, whose dense prefill of the document is kept",
            measured=f"medians of {rounds} interleaved rounds after one to warm up",
            command=command_line(),
        )
        sections = []
        for length in numbers_in(lengths):
            text = str(tokenizer.decode(packaged_text(tokenizer, length)))
            sections.append(table(length, said, measured(pipes, text, QUESTIONS[:questions], rounds)))
            save_page(sections, out / "documents.md")
        console.print(Markdown((out / "documents.md").read_text(encoding="utf-8")))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def measured(pipes: dict[str, LazyPipeline], text: str, questions: list[str], rounds: int) -> dict[str, Times]:
    """What each needs for the document and the questions."""
    first = next(iter(pipes.values()))
    runs: dict[str, Callable[[Times], None]] = {"unmodified": partial(run_dense, first, text, questions)}
    runs |= {name: partial(run_lazy, pipe, text, questions) for name, pipe in pipes.items()}
    found: dict[str, Times] = defaultdict(Times)
    shuffled = random.Random(0)
    for number in track(range(rounds + 1), description="rounds", console=console):
        for name in shuffled.sample(list(runs), len(runs)):
            runs[name](Times() if number == 0 else found[name])
    return found


@torch.inference_mode()
def run_dense(pipe: LazyPipeline, text: str, questions: list[str], times: Times) -> None:
    """A dense prefill of the document; every question goes on from it."""
    model: Any = pipe.model
    prompts = prompts_of(pipe.load(text, depth=0), questions)
    shared = shared_prefix(prompts)
    cache = DynamicCache(config=model.config)
    text_ids = ids(prompts[0][:shared], model)
    times.load.append(seconds(partial(model, text_ids, past_key_values=cache, logits_to_keep=1)))
    times.bytes_per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / shared
    answers = []
    for prompt in prompts:
        new = ids(prompt[shared:], model)
        answers.append(seconds(partial(model, new, past_key_values=cache, logits_to_keep=1)))
        cache.crop(shared - cache.get_seq_length())
    times.questions.append(answers)


def run_lazy(pipe: LazyPipeline, text: str, questions: list[str], times: Times) -> None:
    """The document is loaded, then asked."""
    document = pipe.load(text)
    assert document.loaded is not None
    times.load.append(document.loaded.seconds)
    times.bytes_per_token = document.loaded.bytes_per_token
    times.questions.append([first_token(document, question) for question in questions])
    times.computed = document.computed_fraction


def first_token(document: Document, question: str) -> float:
    """Seconds to the first token of a reply."""
    result = document.ask(question, max_new_tokens=1, do_sample=False)
    assert not isinstance(result, list)
    return result.stats.ttft_seconds


def prompts_of(document: Document, questions: list[str]) -> list[list[int]]:
    return [document.prompt(question).token_ids for question in questions]


def shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with."""
    return next(place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)


def ids(tokens: list[int], model: Any) -> torch.Tensor:
    return torch.tensor([tokens], device=model.device)


def seconds(run: Callable[[], Any]) -> float:
    """Time of a call, until the device is done."""
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def table(length: int, said: str, found: dict[str, Times]) -> Section:
    """One line for each run."""
    dense = found["unmodified"]
    whole = [load + asked[0] for load, asked in zip(dense.load, dense.questions, strict=True)]
    rows = []
    for name, times in found.items():
        first = [asked[0] for asked in times.questions]
        later = [median(asked[1:]) for asked in times.questions if asked[1:]]
        rows.append(
            [
                name,
                f"{median(times.load):.2f} s",
                f"{median(own / base for own, base in zip(times.load, dense.load, strict=True)):.3f}",
                f"{median(first):.2f} s",
                f"{median(own / base for own, base in zip(first, whole, strict=True)):.3f}",
                f"{median(later):.3f} s" if later else "-",
                f"{times.bytes_per_token:,.0f} ({times.bytes_per_token / dense.bytes_per_token:.2f})",
                f"{times.computed:.0%}",
            ]
        )
    columns = ["run", "loading", "of dense", "first question", "of a dense prefill with it", "later questions"]
    columns += ["bytes per token after loading (of dense)", "computed after all questions"]
    return Section(f"A document of {length:,} tokens", said, columns, rows)


if __name__ == "__main__":
    typer.run(main)
