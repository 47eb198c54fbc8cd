"""The attention function lazyllm registers with transformers: the model's own kernel, run row by row.

It is handed an `AttentionPlan` in place of a mask, cuts the packed queries into rows, gives each row, with its
keys and values, to the kernel the model was loaded with, and notes the queries and keys for the scorer.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lazyllm.caches.indexing import locate
from lazyllm.models.masks import Span, additive, causal, padding_mask
from lazyllm.models.ranks import ALONE, Ranks

ATTENTION_NAME = "lazyllm"
FLASH_KERNELS = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
KERNELS = ("sdpa", "eager", *FLASH_KERNELS)

BLOCK = 256
"""Queries whose attention is written down at once."""

Kernel = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True)
class AttentionInputs:
    """Queries and keys of one row as its layer used them: after RoPE, q/k-norm and scaling rules.

    Of a model that several processes share, each has its own heads. What scorers read is of all heads, and the same in
    every process.

    Attributes:
        own_queries: [h, q, d] of the step's new tokens, in order of position.
        query_positions: [q] their positions.
        own_keys: [g, k, d] of the attended tokens, in storage order.
        key_tokens: [k] which tokens these are.
        key_positions: [k] their positions.
        own_values: [g, k, d] their values.
        scaling: factor on the dot products.
        softcap: tanh cap on the logits, None = none.
        window: sliding window in positions, None = full attention.
        own_sinks: [h] extra logits that take probability and give no value, None = none.
        ranks: the processes that share the heads.
        query_reach: [q] the last position each query sees; None = its own.
    """

    own_queries: Tensor
    query_positions: Tensor
    own_keys: Tensor
    key_tokens: Tensor
    key_positions: Tensor
    own_values: Tensor
    scaling: float
    softcap: float | None
    window: int | None
    own_sinks: Tensor | None
    ranks: Ranks = ALONE
    query_reach: Tensor | None = None

    @property
    def queries(self) -> Tensor:
        """[h, q, d] of the step's new tokens."""
        return self.ranks.all_heads(self.own_queries)

    @property
    def keys(self) -> Tensor:
        """[g, k, d] of the attended tokens, in storage order."""
        return self.ranks.all_heads(self.own_keys)

    @property
    def values(self) -> Tensor:
        """[g, k, d] of the attended tokens, in storage order."""
        return self.ranks.all_heads(self.own_values)

    def probabilities(self, last: int) -> Tensor:
        """Attention [h, q, k] in float32 (float64 stays) of the `last` queries; O(last * k), never N x N."""
        queries = self.own_queries.shape[1]
        return self.ranks.all_heads(self._probabilities(max(0, queries - last), queries))

    def received(self, last: int | None = None) -> Tensor:
        """Attention [h, k] that each key gets from the `last` queries, or from all, summed over them.

        Goes through the queries in blocks: as many pairs as attention itself, but O(block * k) memory.
        """
        queries = self.own_queries.shape[1]
        first = 0 if last is None else max(0, queries - last)
        blocks = [(start, min(start + BLOCK, queries)) for start in range(first, queries, BLOCK)]
        total = self._probabilities(*blocks[0]).sum(1)
        for block in blocks[1:]:
            total += self._probabilities(*block).sum(1)
        return self.ranks.all_heads(total)

    def _probabilities(self, start: int, stop: int) -> Tensor:
        """Attention [h, q, k] of this process's heads of the queries from `start` to `stop`."""
        queries = rearrange(self.own_queries[:, start:stop], "(g n) q d -> g (n q) d", g=self.own_keys.shape[0])
        logits = torch.matmul(queries, self.own_keys.transpose(1, 2))
        logits = rearrange(logits, "g (n q) k -> (g n) q k", q=stop - start) * self.scaling
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        reach = None if self.query_reach is None else self.query_reach[start:stop]
        allowed = causal(self.query_positions[start:stop], self.key_positions, self.window, reach)
        logits = logits.masked_fill(~allowed.to(logits.device), -torch.inf)
        if self.own_sinks is not None:
            sinks = repeat(self.own_sinks.to(logits), "h -> h q 1", q=stop - start)
            return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
        return logits.softmax(-1)

    def behind(self, earlier: "AttentionInputs") -> "AttentionInputs":
        """These, with the queries of an earlier piece of the same layer in front."""
        return replace(
            self,
            own_queries=torch.cat([earlier.own_queries, self.own_queries], dim=1),
            query_positions=torch.cat([earlier.query_positions, self.query_positions]),
        )

    def columns(self, tokens: Tensor) -> Tensor:
        """Indices [v] of `tokens` along the key axis."""
        return locate(self.key_tokens, tokens).to(self.own_keys.device)


@dataclass
class Captured:
    """What one layer notes for scorers.

    Attributes:
        rows: by row, what its attention used.
        updates: [1, t, c] for each piece of the step, what attention added to the states of the packed tokens; None
            when nobody will ask.
    """

    rows: dict[int, AttentionInputs] = field(default_factory=dict)
    updates: list[Tensor] | None = None


class Peeked(Exception):
    """Ends a layer that was run for its queries and keys alone."""


@dataclass(frozen=True)
class RowPlan:
    """Attention of one row at one layer.

    Attributes:
        row: index of the row in the batch.
        queries: slice of the packed query axis.
        query_tokens: [q] the tokens to compute, ascending.
        read_key_tokens: gives the tokens [k] attended, in storage order.
        new_queries: how many of the last queries are the step's new tokens.
        positions: [t] position of every token of the row.
        read_spans: gives the calls of the kernel that make up the row.
        reach: [t] the last position each token sees; None = its own.

    What is read is known only once the layer has put its keys into the cache: their order decides.
    """

    row: int
    queries: slice
    query_tokens: Tensor
    read_key_tokens: Callable[[], Tensor]
    new_queries: int
    positions: Tensor
    read_spans: Callable[[], list[Span]]
    reach: Tensor | None = None


@dataclass(frozen=True)
class AttentionCall:
    """How a layer called the attention function.

    Attributes:
        module: the module that called.
        options: what it gave besides queries, keys, values and the plan.
    """

    module: nn.Module
    options: dict[str, Any]


@dataclass
class AttentionPlan:
    """What the attention function needs for one layer of one step.

    Attributes:
        rows: the rows that compute something.
        kernel: name of the attention implementation the model was loaded with.
        window: the layer's sliding window in positions.
        captured: where to note what scorers read; None when they will not ask.
        calls: the layer's calls of the attention function.
        peeks: whether the layer is run for its queries and keys alone: attention ends it with `Peeked`.
        ranks: the processes that share the model.
    """

    rows: list[RowPlan]
    kernel: str
    window: int | None
    captured: Captured | None
    calls: list[AttentionCall] = field(default_factory=list)
    peeks: bool = False
    ranks: Ranks = ALONE


def planned_attention(
    module: nn.Module,
    query: Tensor,
    key: Sequence[Tensor] | Tensor,
    value: Sequence[Tensor] | Tensor,
    attention_mask: AttentionPlan | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over packed rows: query [1, h, q, d], each row's keys and values [1, g, k, d], to [1, q, h, d].

    Inside a compiled layer there is no plan, and the call becomes the operation that finds it.
    """
    if attention_mask is None:
        return torch.ops.lazyllm.attend(query, key, value), None
    plan = attention_mask
    plan.calls.append(AttentionCall(module, kwargs))
    outputs = []
    for row, keys, values in zip(plan.rows, key, value, strict=True):
        queries = query[:, :, row.queries] if len(plan.rows) > 1 else query
        if plan.captured is not None:
            inputs = _inputs(plan, row, queries, keys, values, **kwargs)
            earlier = plan.captured.rows.get(row.row)
            plan.captured.rows[row.row] = inputs if earlier is None else inputs.behind(earlier)
        if plan.peeks:
            continue
        for span in row.read_spans():
            taken = span.take(queries, keys, values)
            kernel, mask = choose_kernel(plan.kernel, module, span.read_mask(), taken[0])
            outputs.append(kernel(module, *taken, mask, **kwargs)[0])
    if plan.peeks:
        raise Peeked
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def _inputs(
    plan: AttentionPlan, row: RowPlan, queries: Tensor, keys: Tensor, values: Tensor, **kwargs: Any
) -> AttentionInputs:
    """What a scorer gets to see of a row's queries [1, h, q, d], keys and values [1, g, k, d]."""
    new, key_tokens = row.new_queries, row.read_key_tokens()
    query_tokens = row.query_tokens[row.query_tokens.numel() - new :]
    return AttentionInputs(
        own_queries=queries[0, :, queries.shape[2] - new :],
        query_positions=row.positions[query_tokens],
        own_keys=keys[0],
        key_tokens=key_tokens,
        key_positions=row.positions[key_tokens],
        own_values=values[0],
        scaling=kwargs.get("scaling") or queries.shape[-1] ** -0.5,
        softcap=kwargs.get("softcap"),
        window=plan.window,
        own_sinks=kwargs.get("s_aux"),
        ranks=plan.ranks.holding(queries.shape[1]),
        query_reach=None if row.reach is None else row.reach[query_tokens],
    )


def choose_kernel(name: str, module: nn.Module, mask: Tensor | None, queries: Tensor) -> tuple[Kernel, Tensor | None]:
    """The kernel for one row and the mask in the form it reads.

    Flash kernels read no arbitrary mask, so rows that need one run on sdpa. One query, and any masked queries on CPU,
    run on sdpa as `shared_heads` calls it.
    """
    if name == "eager":
        return eager_kernel(module), additive(mask, queries)
    if name in FLASH_KERNELS and mask is None:
        return ALL_ATTENTION_FUNCTIONS[name], None
    if queries.shape[2] == 1 or (mask is not None and queries.device.type == "cpu"):
        return shared_heads, mask
    return ALL_ATTENTION_FUNCTIONS["sdpa"], mask


def shared_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """sdpa that reads the keys and values a group of heads shares once, instead of repeating them for each head.

    Of one query, the heads of a group become the queries of their keys; several queries are left to the kernel, which
    knows groups. Takes and gives what transformers' sdpa does, and leaves to it what it refuses.
    """
    groups = key.shape[1]
    if query.shape[1] == groups or kwargs.get("softcap") is not None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    one = query.shape[2] == 1
    if one:  # heads "1 (g n) 1 d -> 1 g n d" and back; a view, since einops takes 1 ms of a step of 30 layers
        query = query.view(1, groups, -1, query.shape[3])
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=not one
    )
    return output.reshape(1, 1, -1, output.shape[3]) if one else output.transpose(1, 2), None


def eager_kernel(module: nn.Module) -> Kernel:
    """The eager attention of the family `module` belongs to, as its own file defines it."""
    kernel: Kernel = sys.modules[type(module).__module__].eager_attention_forward
    return kernel


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, planned_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, padding_mask)
