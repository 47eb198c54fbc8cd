"""The replay oracle (law 5): one dense forward with exactly the masks a lazy history used.

`replay` runs the unmodified layers once over all tokens of one row. At each layer, the query of a token
sees the keys that were attended when that token was computed there, and nothing else. It shares no code
with the stack, the stores or the masks it judges.

Of a cache that rounds, the replay rounds the same numbers: `Rounding` says which.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from lazyllm import CachePolicy, QuantizedAux, QuantizedKV
from lazyllm.callbacks import LayerEnd
from lazyllm.models.names import CACHE
from tests.histories import History

TOLERANCE = 1e-12


@dataclass(frozen=True)
class Rounding:
    """What a cache rounds, to how many bits; None = nothing."""

    states: int | None = None
    keys_and_values: int | None = None


EXACT = Rounding()


def rounding_of(policy: CachePolicy) -> Rounding:
    """What a cache policy rounds."""
    return Rounding(
        states=policy.bits if isinstance(policy, QuantizedAux) else None,
        keys_and_values=policy.bits if isinstance(policy, QuantizedKV) else None,
    )


def rounded(numbers: Tensor, bits: int | None) -> Tensor:
    """Vectors [..., d] whose numbers are whole multiples of their largest one divided by 127 (8 bits) or 7 (4 bits)."""
    if bits is None:
        return numbers
    scale = numbers.abs().amax(-1, keepdim=True) / {8: 127, 4: 7}[bits]
    return (numbers / torch.where(scale == 0, 1, scale)).round() * scale


class RoundedKeys:
    """Stands in for the cache of a layer: hands keys and values back, rounded."""

    def __init__(self, bits: int | None) -> None:
        self.bits = bits

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return rounded(keys, self.bits), rounded(values, self.bits)


class ReplayStack(nn.Module):
    """Runs layers with one explicit [t, t] boolean mask each, without a cache.

    `waited[layer]` [t] are the tokens that stopped before the layer and were taken up there later.
    """

    def __init__(
        self,
        decoder: Any,
        masks: Sequence[Tensor],
        waited: Sequence[Tensor],
        positions: Tensor,
        rounding: Rounding,
        places: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.decoder, self.masks, self.positions = [decoder], masks, positions
        self.places = positions[None] if places is None else places
        self.waited, self.rounding = waited, rounding
        self.original = [decoder.layers]
        self.states: list[Tensor] = []

    def forward(self, hidden: Tensor, *_: Any, **given: Any) -> Tensor:
        decoder = self.decoder[0]
        shared = {name: value for name, value in given.items() if isinstance(value, Mapping)}  # by all layers
        positions = self.positions[None]
        two_ropes = isinstance(getattr(decoder.config, "rope_parameters", None), dict) and (
            "full_attention" in decoder.config.rope_parameters
        )
        keys_and_values = RoundedKeys(self.rounding.keys_and_values)
        for index, layer in enumerate(self.original[0]):
            self.states.append(hidden[0])
            hidden = torch.where(self.waited[index][:, None], rounded(hidden, self.rounding.states), hidden)
            rope = (
                decoder.rotary_emb(hidden, positions, decoder.config.layer_types[index])
                if two_ropes
                else decoder.rotary_emb(hidden, self.places)
            )
            mask = self.masks[index][None, None]
            if decoder.config._attn_implementation == "eager":
                mask = torch.zeros(mask.shape, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rope,
                **{CACHE: keys_and_values},
                **shared,
            )
        return hidden


def replay(
    model: PreTrainedModel,
    ids: Tensor,
    steps: Sequence[Sequence[LayerEnd]],
    row: int,
    positions: Tensor | None = None,
    *,
    rounding: Rounding = EXACT,
    places: Tensor | None = None,
    reach: Tensor | None = None,
    inputs: dict[str, Any] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Logits [t, vocabulary] of one row under the masks of `steps`, and the states [t, c] entering each layer.

    Args:
        model: the unmodified model.
        ids: [t] all tokens of the row, in order.
        steps: by step, by layer, what was computed and attended.
        row: which row of the batch.
        positions: [t], default 0 .. t-1.
        rounding: what the cache rounds.
        places: [3, 1, t] where RoPE sees the tokens, default at their positions.
        reach: [t] the last position that each token sees, default its own.
        inputs: what else the model is given, such as images.
    """
    decoder: Any = model.get_decoder()
    length = ids.numel()
    positions = torch.arange(length) if positions is None else positions
    causal = (positions if reach is None else reach)[:, None] >= positions[None, :]
    _, options = get_layer_types_and_kwargs(decoder.config)
    masks, waited = [], []
    latest = arrivals(steps, row, length)
    for layer in range(len(decoder.layers)):
        mask = torch.eye(length, dtype=torch.bool)
        before = latest.clone()
        for number, step in enumerate(steps):
            if layer >= len(step):  # all tokens wait
                continue
            trace = step[layer].rows[row]
            latest[trace.computed] = number
            for token in trace.computed.tolist():
                mask[token] = False
                mask[token, trace.attended] = True
        mask &= causal
        window = options[layer].get("sliding_window")
        if window is not None:
            mask &= positions[:, None] - positions[None, :] < window
        masks.append(mask)
        waited.append(latest > before)
    stack = ReplayStack(decoder, masks, waited, positions, rounding, places)
    original = decoder.layers
    decoder.layers = nn.ModuleList([stack])
    try:
        with torch.no_grad():
            logits = model(ids[None], position_ids=positions[None], use_cache=False, **(inputs or {})).logits[0]
    finally:
        decoder.layers = original
    return logits, stack.states


def arrivals(steps: Sequence[Sequence[LayerEnd]], row: int, length: int) -> Tensor:
    """[t] the step that brought each token: the last one whose new tokens began at it or before."""
    brought = torch.zeros(length, dtype=torch.long)
    for number, step in enumerate(steps):
        if step:
            brought[step[0].rows[row].first_new :] = number
    return brought


def assert_replays(history: History, tolerance: float = TOLERANCE * 100) -> None:
    """Every logit row a history returned equals the replay's."""
    rounding = rounding_of(history.cache.policy)
    for row, ids in enumerate(history.ids):
        if not ids:
            continue
        expected, _ = replay(history.pipe.model, torch.tensor(ids), history.steps, row, rounding=rounding)
        for logits, tokens in zip(history.logits, history.tokens, strict=True):
            real = tokens[row] >= 0
            got = logits[row, real]
            reached = ~got.isnan().any(-1)
            if real.any():
                assert reached[-1], "the last token of a step has logits"
            wanted = expected[tokens[row][real]]
            torch.testing.assert_close(got[reached], wanted[reached], rtol=0, atol=tolerance)
