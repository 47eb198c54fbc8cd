"""A question about a long speech, answered by a small real model: unmodified beside two presets of lazyllm.

    python examples/demo.py

Needs no network. Writes out/demo-tokens-per-layer.png, out/demo-kept.png and out/demo-stats.json.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from lazyllm import (
    GenerationResult,
    GenerationStats,
    LazyConfig,
    LazyPipeline,
    ProgressBar,
    TokenTrace,
)
from lazyllm.evaluation.data import packaged_model, packaged_speech, quiet_loading
from lazyllm.evaluation.plots import plot_kept
from lazyllm.generation.clock import TokenClock
from lazyllm.models.loading import load_model

# isort: split
# behind lazyllm, which keeps back what torchao logs while transformers imports it
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

SPEECH, SPEAKER = "1985-Reagan-1", "Ronald Reagan's State of the Union address of 1985"
QUESTION = "What is the name of the young woman who will graduate from West Point?"
EXPECTED = "Jean Nguyen"
ROUNDS = 2
OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
OUT = Path("out")

SETTINGS = {
    "paper": LazyConfig.preset("paper"),
    "recommended": LazyConfig.preset("recommended"),
}

console = Console()


@dataclass
class Runs:
    """What one contender answered, and how long it took in each round."""

    answer: str = ""
    ttft_seconds: list[float] = field(default_factory=list)
    seconds_per_token: list[float] = field(default_factory=list)
    stats: GenerationStats | None = None

    @property
    def is_right(self) -> bool:
        return EXPECTED.lower() in self.answer.lower()


def main() -> None:
    model, tokenizer = quiet_load()
    prompt = chat_prompt()
    tokens = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    console.print(f"[bold]Text:[/bold] {SPEAKER} ({tokens:,} tokens with the question)")
    console.print(f"[bold]Question:[/bold] {QUESTION}")
    runs = {name: Runs() for name in ("unmodified", *SETTINGS)}
    warm_up(model, tokenizer)
    for number in range(1, ROUNDS + 1):
        console.rule(f"round {number} of {ROUNDS}", style="dim")
        run_unmodified(model, tokenizer, prompt, runs["unmodified"])
        for name, config in SETTINGS.items():
            run_lazy(
                LazyPipeline.from_config(config, model, tokenizer, callbacks=[ProgressBar()]), prompt, name, runs[name]
            )
    console.print()
    console.print(table(runs))
    verdict(runs)
    save(runs, tokens, draw_kept(model, tokenizer, prompt))


def quiet_load() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The packaged model in float32, without transformers' own bars and notices."""
    path = packaged_model()
    with console.status(f"loading {path.name}"), quiet_loading():
        model, tokenizer = load_model(path, dtype=torch.float32)
    parameters = sum(weight.numel() for weight in model.parameters())
    console.print(
        f"[bold]Model:[/bold] {path.stem}, {parameters / 1e6:.0f}M parameters, float32, {model.device}, "
        f"{torch.get_num_threads()} threads"
    )
    return model, tokenizer


def chat_prompt() -> list[dict[str, str]]:
    text = f"{packaged_speech(SPEECH)}\n\n{QUESTION} Answer in one short sentence."
    return [{"role": "user", "content": text}]


def warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """One short run each, so that the first measured run pays for nothing that the others do not."""
    ids = tokenizer(packaged_speech(SPEECH), truncation=True, max_length=600)["input_ids"]
    with console.status("warming up"):
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **OPTIONS)
        for config in SETTINGS.values():
            LazyPipeline.from_config(config, model, tokenizer).generate(ids, **OPTIONS)


def run_unmodified(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]], runs: Runs
) -> None:
    """Plain `model.generate`, timed from before tokenisation, as a pipeline times itself."""
    with console.status("unmodified model"):
        started = time.perf_counter()
        clock = TokenClock(model.device)
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([clock]), **OPTIONS)
    runs.answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    per_token = (clock.times[-1] - clock.times[0]) / max(1, len(clock.times) - 1)
    note(runs, "unmodified", clock.times[0] - started, per_token)


def run_lazy(pipeline: LazyPipeline, prompt: list[dict[str, str]], name: str, runs: Runs) -> None:
    result = cast(GenerationResult, pipeline.generate(prompt, **OPTIONS))
    runs.answer, runs.stats = result.text.strip(), result.stats
    note(runs, name, result.stats.ttft_seconds, result.stats.seconds_per_output_token or 0.0)


def note(runs: Runs, name: str, ttft: float, per_token: float) -> None:
    runs.ttft_seconds.append(ttft)
    runs.seconds_per_token.append(per_token)
    console.print(f"{name}: first token after {ttft:.2f} s", highlight=False)


def table(runs: dict[str, Runs]) -> Table:
    view = Table(title=f"{SPEECH}: the better of {ROUNDS} rounds", show_lines=True)
    view.add_column("")
    for name in runs:
        view.add_column(name, justify="right")
    dense = min(runs["unmodified"].ttft_seconds)
    everyone = list(runs.values())
    stats = [run.stats for run in everyone]
    view.add_row("time to first token", *(f"{min(run.ttft_seconds):.2f} s" for run in everyone))
    view.add_row("speedup", *(f"{dense / min(run.ttft_seconds):.2f}x" for run in everyone))
    view.add_row("predicted from operations", *(f"{one.predicted_speedup:.2f}x" if one else "1.00x" for one in stats))
    view.add_row("per output token", *(f"{1000 * min(run.seconds_per_token):.0f} ms" for run in everyone))
    view.add_row("layer-tokens computed", *(f"{one.computed_fraction:.1%}" if one else "100.0%" for one in stats))
    view.add_row("layer-tokens revived", *(f"{one.revived_tokens:,}" if one else "0" for one in stats))
    view.add_row("answer", *(run.answer for run in everyone))
    view.add_row("right", *("[green]yes[/green]" if run.is_right else "[red]no[/red]" for run in everyone))
    return view


def verdict(runs: dict[str, Runs]) -> None:
    console.print(f"The text says: {EXPECTED}.", highlight=False)
    for name, run in runs.items():
        console.print(f"{name} {'gave' if run.is_right else 'lost'} that answer.", highlight=False)
    for name, config in SETTINGS.items():
        console.print(
            f"[dim]{name}: {config.scorer}, {config.schedule}, {config.cache}, {config.protect}[/dim]", highlight=False
        )


def draw_kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[dict[str, str]]) -> Path:
    """Which tokens the recommended preset computes, with the sentences that name the answer marked."""
    trace = TokenTrace()
    pipeline = LazyPipeline.from_preset("recommended", model, tokenizer, callbacks=[trace])
    pipeline.generate(prompt, max_new_tokens=1)
    sentences = [part for part in packaged_speech(SPEECH).split(". ") if EXPECTED in part]
    return plot_kept(trace, OUT / "demo-kept.png", marked=pipeline.find(prompt, sentences))


def save(runs: dict[str, Runs], tokens: int, kept: Path) -> None:
    OUT.mkdir(exist_ok=True)
    data = {
        "speech": SPEECH,
        "question": QUESTION,
        "expected": EXPECTED,
        "prompt_tokens": tokens,
        "threads": torch.get_num_threads(),
        "runs": {
            name: {
                "answer": run.answer,
                "is_right": run.is_right,
                "ttft_seconds": run.ttft_seconds,
                "seconds_per_output_token": run.seconds_per_token,
                "config": SETTINGS[name].to_dict() if name in SETTINGS else None,
                "stats": run.stats.to_dict() if run.stats else None,
            }
            for name, run in runs.items()
        },
    }
    path = OUT / "demo-stats.json"
    path.write_text(json.dumps(data, indent=2))
    paper = runs["paper"].stats
    assert paper is not None
    figure = paper.plot(OUT / "demo-tokens-per-layer.png")
    console.print(f"Written: {figure} (the paper preset), {kept} (the recommended one) and {path}", highlight=False)


if __name__ == "__main__":
    main()
