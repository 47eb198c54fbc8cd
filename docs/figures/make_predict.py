"""Draws predict.png and prints the table of ../predict.md: an 8B on one H100 and a 70B on four."""

from pathlib import Path

from lazyllm.config import LazyConfig
from lazyllm.costs import Device, ModelShape, predict
from lazyllm.evaluation.plots import plot_prediction

MODELS = {"llama-3.1-8b": 1, "llama-3.1-70b": 4}
PRESETS = ("recommended", "static-pruning", "paper")
LENGTHS = (8192, 32768, 131072)

device = Device.named("h100-sxm")
drawn = {}
for name, parallel in MODELS.items():
    shape = ModelShape.named(name)
    for preset in PRESETS:
        config = LazyConfig.preset(preset)
        lines = [predict(shape, config, device, tokens=tokens, parallel=parallel) for tokens in LENGTHS]
        if preset == PRESETS[0]:
            drawn[f"{name} on {parallel}"] = lines
        for line in lines:
            dense, pruned = line.dense.prefill, line.pruned.prefill
            print(
                f"| {name} on {parallel} | {line.tokens:,} | `{preset}` | {dense.total:.2f} | "
                f"{dense.linear / dense.total:.0%} | {dense.attention / dense.total:.0%} | {pruned.total:.2f} | "
                f"{line.speedup:.1f}x | {line.keep_limit:.2f}x | {1e3 * line.dense.decode.total:.1f} | "
                f"{1e3 * line.pruned.decode.total:.1f} | {line.dense.kv_bytes / 1e9:.1f} | "
                f"{line.pruned.kv_bytes / 1e9:.1f} | {line.pruned.aux_bytes / 1e9:.1f} | {line.break_even_tokens} | "
                f"{line.layer_limit}"
            )
print(plot_prediction(drawn, Path(__file__).parent / "predict.png"))
