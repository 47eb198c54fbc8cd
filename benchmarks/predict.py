"""Predicted against measured time to first token on this machine, by model, run and prompt length.

    python benchmarks/predict.py --lengths 512,1024,2048,4096 --rounds 5
    python benchmarks/predict.py --quick

The device is calibrated first, on synthetic work and on none of the models timed here: a random Llama of six layers
and the packaged SmolLM2-135M-Instruct, both in float32. Writes out/predict.json, out/predict.md and out/predict.png.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from lazyllm.costs import Device, calibrate
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import environment
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.options import numbers_in
from lazyllm.evaluation.plots import plot_checks
from lazyllm.evaluation.predictions import Check, check, errors_in_words, section
from lazyllm.evaluation.sections import Section, command_line, save_page
from lazyllm.models.loading import load_model

# isort: split
# behind lazyllm, which keeps back what torchao logs while transformers imports it
from transformers import LlamaConfig, LlamaForCausalLM

QUICK_LENGTHS = [256, 512]

console = Console(width=None if Console().is_terminal else 140)


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,1024,2048,4096",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of everything, after one to warm up.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="256 and 512 tokens, one round.")] = False,
    device: Annotated[Path | None, typer.Option(help="Numbers saved before, instead of measuring them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and PNG.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the order within a round.")] = 0,
) -> None:
    try:
        run(QUICK_LENGTHS if quick else numbers_in(lengths), 1 if quick else rounds, device, out, seed)
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def run(lengths: Sequence[int], rounds: int, device_file: Path | None, out: Path, seed: int) -> None:
    with console.status("calibrating") as status:
        device = Device.load(device_file) if device_file else calibrate(on_part=lambda part: status.update(part))
    checks: list[Check] = []
    sections: list[Section] = []
    machine: dict[str, Any] = {}
    for name in ("random Llama", "SmolLM2-135M"):
        with quiet_loading():
            model = _random_llama() if name == "random Llama" else load_model(packaged_model(), dtype=torch.float32)[0]
        machine = environment(model)
        own: list[Check] = []
        for length in lengths:
            with console.status(f"{name}, {length:,} tokens"):
                own += check(name, model, device, length, rounds, seed)
        checks += own
        sections.append(section(own, machine, rounds, command_line()))
        console.print(Markdown(sections[-1].markdown()))
    console.print(errors_in_words(checks))
    page, data = save_page(sections, out / "predict.md"), out / "predict.json"
    lines = [asdict(one) | {"error": one.error} for one in checks]
    report = {"rounds": rounds, "environment": machine, "device": device.model_dump(), "checks": lines}
    data.write_text(json.dumps(report, indent=2), encoding="utf-8")
    console.print("written:", data, page, plot_checks(checks, out / "predict.png"))


def _random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1 << 15, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    typer.run(main)
