"""Draws kept.png: what every scorer keeps of one and the same prompt.

Run it from anywhere: `python docs/figures/make_kept.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from lazyllm import SCORERS, LazyPipeline, Protect, Stages
from lazyllm.callbacks import Callback, LayerEnd
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.tasks import Item, Maker, make_items
from lazyllm.models.loading import load_model

KEEP, LAYER, TOKENS, SEED = 0.2, 3, 1000, 1
FIELDS: dict[str, dict[str, Any]] = {
    "TwoHop": {"scorer": "LateInteraction"},
    "Pooled": {"scorer": "WindowAttention", "width": 33},
    "Blockwise": {"scorer": "WindowAttention", "size": 64},
    "Combined": {"scorers": {"LateInteraction": 1.0, "WindowAttention": 1.0}},
}
"""Scorers made of others, and what of."""


class _Enter(Callback):
    """Notes which tokens enter the layer."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0, dtype=torch.long)

    def on_layer_end(self, event: LayerEnd) -> None:
        if event.layer == LAYER:
            self.tokens = event.rows[0].visible


def kept(model: Any, tokenizer: Any, item: Item, name: str) -> np.ndarray:
    """By token of the prompt, whether a scorer keeps it."""
    fields = {"answer": item.reference} if name == "Oracle" else FIELDS.get(name, {})
    noting = _Enter()
    pipe = LazyPipeline(
        model,
        tokenizer,
        scorer={"name": name, **fields},
        schedule=Stages({LAYER: KEEP}),
        cache="DropCache",
        protect=Protect(),
        callbacks=[noting],
    )
    encoded = pipe.encode(item.prompt)
    with torch.no_grad(), pipe.attached() as lazy:
        cache = pipe.new_cache(marks=[encoded.marks])
        lazy(torch.tensor([encoded.token_ids]), past_key_values=cache, logits_to_keep=1)
    mask = np.zeros(len(encoded.token_ids), dtype=bool)
    mask[noting.tokens.numpy()] = True
    return mask


def draw(rows: dict[str, np.ndarray], evidence: slice, path: Path) -> None:
    """One line per scorer, from the first token to the last."""
    figure = Figure(figsize=(9, 0.34 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    shown = np.stack(list(rows.values()))
    axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1.3)
    axes.axvspan(evidence.start - 0.5, evidence.stop - 0.5, color="C1", alpha=0.35, linewidth=0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_xlabel("token of the prompt")
    found = axes.secondary_yaxis("right")
    found.set_yticks(range(len(rows)), [f"{row[evidence].mean():.0%}" for row in rows.values()])
    found.set_ylabel("of the answering sentence")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Runs every scorer and draws what it keeps."""
    with quiet_loading():
        model, tokenizer = load_model(packaged_model(), dtype=torch.float32)
    (item,) = make_items("squad", Maker(tokenizer, TOKENS), 1, seed=SEED)
    pipe = LazyPipeline.from_preset("dense", model, tokenizer)
    start, stop = pipe.find(item.prompt, item.evidence)[0]
    rows = {name: kept(model, tokenizer, item, name) for name in SCORERS}
    for name, row in rows.items():
        print(f"{name:24} {row.mean():5.0%} kept, {row[start:stop].mean():5.0%} of the evidence")
    draw(rows, slice(start, stop), Path(__file__).with_name("kept.png"))


if __name__ == "__main__":
    main()
