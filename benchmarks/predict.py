"""Predicted against measured time to first token on this machine, by model, run and prompt length.

    python benchmarks/predict.py --lengths 512,1024,2048,4096 --rounds 5

The device is calibrated first, on synthetic work and on none of the models timed here: a random Llama of six layers
and the packaged SmolLM2-135M-Instruct, both in float32. Writes out/predict.json.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lazyllm.caches import AuxCache
from lazyllm.config import PAPER_STAGES, LazyConfig
from lazyllm.costs import Device, ModelShape, calibrate, predict
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import LazyRun, StockRun, TimedRun, Workload, environment, run_rounds
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.options import numbers_in
from lazyllm.models.loading import load_model
from lazyllm.policies.schedules import Constant, Stages
from lazyllm.policies.scorers import LastTokenAttention, LateInteraction

STOCK_KERNEL = "sdpa"
REUSE = AuxCache(decode="reuse")
RUNS = {
    "dense": LazyConfig.preset("dense"),
    "static-pruning": LazyConfig.preset("static-pruning"),
    "Stages": LazyConfig(scorer=LastTokenAttention(), schedule=Stages(stages=PAPER_STAGES), cache=REUSE),
    "Constant(0.3)": LazyConfig(scorer=LastTokenAttention(), schedule=Constant(keep=0.3), cache=REUSE),
    "Constant(0.3), late interaction": LazyConfig(scorer=LateInteraction(), schedule=Constant(keep=0.3), cache=REUSE),
}

console = Console(width=None if Console().is_terminal else 140)


@dataclass(frozen=True)
class Check:
    """One run at one length: seconds to the first token, predicted and measured."""

    model: str
    run: str
    tokens: int
    predicted_seconds: float
    measured_seconds: float
    samples: list[float]

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_seconds / self.measured_seconds - 1


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "512,1024,2048,4096",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of everything, after one to warm up.")] = 5,
    device: Annotated[Path | None, typer.Option(help="Numbers saved before, instead of measuring them.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the order within a round.")] = 0,
) -> None:
    try:
        run(numbers_in(lengths), rounds, device, out, seed)
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def run(lengths: Sequence[int], rounds: int, device_file: Path | None, out: Path, seed: int) -> None:
    with console.status("calibrating") as status:
        device = Device.load(device_file) if device_file else calibrate(on_part=lambda part: status.update(part))
    checks, machine = [], {}
    for name in ("random Llama", "SmolLM2-135M"):
        with quiet_loading():
            model = _random_llama() if name == "random Llama" else load_model(packaged_model(), dtype=torch.float32)[0]
        machine = environment(model)
        for length in lengths:
            with console.status(f"{name}, {length:,} tokens"):
                checks += compare(name, model, device, length, rounds, seed)
    console.print(table(checks))
    errors = [abs(check.error) for check in checks]
    console.print(f"median error {median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)}")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "predict.json"
    lines = [asdict(check) | {"error": check.error} for check in checks]
    report = {"rounds": rounds, "environment": machine, "device": device.model_dump(), "checks": lines}
    path.write_text(json.dumps(report, indent=2), encoding="utf-8")
    console.print("written:", path)


def compare(name: str, model: PreTrainedModel, device: Device, length: int, rounds: int, seed: int) -> list[Check]:
    """Every run at one length, in shuffled order round by round."""
    shape = ModelShape.of(model.config)
    order = random.Random(seed)
    prompt = [order.randrange(3, shape.vocabulary) for _ in range(length)]
    stock = StockRun(model, STOCK_KERNEL)
    field: list[TimedRun] = [stock, *(LazyRun(model, run, config) for run, config in RUNS.items())]
    timings = run_rounds(field, Workload([prompt], new_tokens=1), rounds, order)
    predictions = {run: predict(shape, config, device, tokens=length, asked=False) for run, config in RUNS.items()}
    expected = {run: prediction.pruned.ttft_seconds for run, prediction in predictions.items()}
    expected[stock.name] = predictions["dense"].dense.ttft_seconds
    return [
        Check(name, run, length, expected[run], median(seconds := [one.ttft_seconds for one in timing]), seconds)
        for run, timing in timings.items()
    ]


def table(checks: Sequence[Check]) -> Table:
    view = Table("model", "run", title="time to first token")
    for column in ("prompt", "predicted s", "measured s", "error"):
        view.add_column(column, justify="right")
    previous = None
    for check in checks:
        if previous not in (None, (check.model, check.tokens)):
            view.add_section()
        previous = check.model, check.tokens
        seconds = f"{check.predicted_seconds:.3f}", f"{check.measured_seconds:.3f}"
        view.add_row(check.model, check.run, f"{check.tokens:,}", *seconds, f"{check.error:+.1%}")
    return view


def _random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=1 << 15, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    typer.run(main)
