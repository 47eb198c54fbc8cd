"""Draws predict.png and prints the tables of ../predict.md: an 8B on one H100 and a 70B on four.

Run it from anywhere: `python docs/figures/make_predict.py`.
"""

from collections.abc import Iterator
from pathlib import Path

from lazyllm.config import LazyConfig
from lazyllm.costs import Device, ModelShape, Prediction, predict
from lazyllm.evaluation.plots import plot_prediction

MODELS = {"llama-3.1-8b": 1, "llama-3.1-70b": 4}
LENGTHS = (8192, 32768, 131072)
SQUAD_KEPT = {0: 0.29, 1: 0.095}
RUNS: dict[str, tuple[str, dict[int, float] | None]] = {
    "`recommended`": ("recommended", None),
    "`recommended`, SQuAD-like": ("recommended", SQUAD_KEPT),
    "`static-pruning`": ("static-pruning", None),
    "`paper`": ("paper", None),
}


def predictions(model: str, run: str) -> list[Prediction]:
    """One run of one model at every length."""
    preset, kept = RUNS[run]
    shape, config, device = ModelShape.named(model), LazyConfig.preset(preset), Device.named("h100-sxm")
    return [predict(shape, config, device, tokens=tokens, parallel=MODELS[model], kept=kept) for tokens in LENGTHS]


def title(model: str) -> str:
    """A model and what it runs on."""
    return f"{model}, {MODELS[model]} x H100"


def dense_rows() -> Iterator[str]:
    """Where the unmodified model's time goes."""
    for model in MODELS:
        for line in predictions(model, "`paper`"):
            cost, parts = line.dense, line.dense.prefill
            linear, attention = parts.linear / parts.total, parts.attention / parts.total
            yield (
                f"| {title(model)} | {line.tokens:,} | {parts.total:.2f} s | {linear:.0%} | {attention:.0%} | "
                f"{1 - linear - attention:.0%} | {1e3 * cost.decode.total:.1f} ms | {cost.kv_bytes / 1e9:.1f} GB | "
                f"{cost.device_bytes / 1e9:.0f} GB |"
            )


def pruned_rows() -> Iterator[str]:
    """What each run makes of it."""
    for model in MODELS:
        for run in RUNS:
            lines = predictions(model, run)
            last = lines[-1]
            cost = last.pruned
            speedups = " | ".join(f"{line.speedup:.1f}x" for line in lines)
            layer_limit = f"{last.layer_limit:.1f}x" if last.layer_limit else "-"
            yield (
                f"| {title(model)} | {run} | {speedups} | {last.keep_limit:.2f}x | {layer_limit} | "
                f"{last.break_even_tokens} | {cost.ttft_seconds:.2f} s | "
                f"{1e3 * cost.seconds_per_output_token:.1f} ms | "
                f"{cost.kv_bytes / 1e9:.1f} GB | {cost.aux_bytes / 1e9:.1f} GB |"
            )


if __name__ == "__main__":
    print("\n".join([*dense_rows(), "", *pruned_rows()]))
    drawn = {title(model): predictions(model, "`recommended`") for model in MODELS}
    print(plot_prediction(drawn, Path(__file__).parent / "predict.png"))
