"""LazyLLM's forward pass (Fu et al. 2024, arXiv 2407.14057, Figure 4), as one module that runs a decoder's layers."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lazyllm.caches.arrival import Arrival
from lazyllm.caches.lazy_cache import LayerView, LazyCache
from lazyllm.caches.step import Step, open_step
from lazyllm.callbacks import Callback, LayerEnd, PieceEnd, PrefillStart, RowTrace, StepEnd
from lazyllm.errors import CacheError, InputError, UnsupportedModelError
from lazyllm.models.attention import AttentionPlan, Captured, Peeked, RowPlan
from lazyllm.models.families import DecoderContract
from lazyllm.models.layers import Packed, RunLayer, noting_updates, run_layer
from lazyllm.models.masks import RowMasks, Seen, seen_by
from lazyllm.models.names import CACHE
from lazyllm.policies.depth_limit import DepthLimit
from lazyllm.policies.scoring import Readings
from lazyllm.policies.select import Selector

Missing = Literal["error", "nan"]


class LazyStack(nn.Module):
    """Runs the original layers over the tokens that matter; stands in for `decoder.layers`.

    Args:
        contract: the decoder's layers and what is known about them.
        selector: decides which tokens enter the next layer.
        callbacks: told about every layer and step.
        missing: "error" refuses to return logits of pruned positions, "nan" returns NaN for them.
        chunk: most tokens a layer computes at once.
        run: runs a layer.
    """

    def __init__(
        self,
        contract: DecoderContract,
        selector: Selector | DepthLimit,
        callbacks: Sequence[Callback] = (),
        missing: Missing = "error",
        chunk: int = sys.maxsize,
        run: RunLayer = run_layer,
    ) -> None:
        super().__init__()
        self.layers = contract.layers
        self.contract, self.selector, self.callbacks = contract, selector, callbacks
        self.missing, self.chunk, self.run = missing, chunk, run
        self.logits_to_keep: int | Tensor = 0
        self.token_ids: Tensor | None = None
        self.places: Tensor | None = None

    def forward(
        self,
        hidden_states: Tensor,
        *others: object,
        attention_mask: Tensor | Seen | None = None,
        position_ids: Tensor | None = None,
        position_embeddings: object = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states [b, t, c] to the last layer's output [b, n, c]; NaN where a token was pruned.

        n is t, or as many columns at the end as the caller of the model said it would read (`logits_to_keep`). Where
        the call brings the end of a prompt and candidates for its reply, that is a prefill and a decode step.
        """
        given = kwargs.pop(CACHE, None)
        self._refuse_tensors(*others, **kwargs)
        cache = self._admit(given, hidden_states)
        keep = (self.logits_to_keep or None) if isinstance(self.logits_to_keep, int) else None
        seen = seen_by(attention_mask)
        arrival = Arrival(hidden_states, seen.padding, position_ids, self.places, seen.ahead, self.token_ids, keep)
        outputs = [self._step(cache, part, kwargs) for part in arrival.parts(cache.prompt_left)]
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, dim=1)[:, -(keep or arrival.width) :]

    def _step(self, cache: LazyCache, arrival: Arrival, kwargs: dict[str, Any]) -> Tensor:
        """The layer loop over new columns, to output [b, n, c]."""
        with open_step(cache, arrival, layers=len(self.layers)) as step:
            self._tell_start(step)
            rope, masks = None, RowMasks(arrival.hidden.device)
            chunk = sys.maxsize if step.looks_ahead else self.chunk
            visible = self.selector.first(step, partial(self._peek, step, 0, masks=masks, options=kwargs))
            noted: deque[Captured] = deque(maxlen=self.selector.reads_layers)
            for i, layer in enumerate(self.layers):
                flight, todo = step.flight, step.todo(visible, i)  # visible tokens whose depth is i (law 2)
                hidden = self.contract.to_layer(step.pending(todo), i)  # in flight, or revived from the Aux Cache
                if not any(tokens.numel() for tokens in visible):
                    break  # all of them wait for a later step
                if rope is None or todo is not flight:
                    positions = step.positions()
                    rope = self.contract.rope(hidden, step.rope_positions(positions))
                view = step.view(i, visible)
                packed = Packed(hidden, positions, self.contract.to_layer(rope[self.contract.rope_types[i]], i))
                captured = self.selector.notes_of(step, i, visible)
                for place, piece in view.pieces(chunk):
                    plan = self._plan(step, piece, i, masks, captured)
                    with noting_updates(self.contract, i, captured):
                        output = self.run(layer, packed.at(place), plan, piece, kwargs)
                    step.receive(place, output)
                    self._tell_piece(step, i, place)
                step.advance(i)  # depth is i + 1 now
                self._tell_layer(step, view, i, visible)
                noted.append(captured or Captured())
                readings = Readings(tuple(noted), partial(self._peek, step, i + 1, visible, masks, kwargs))
                visible = self.selector.select(step, i, visible, readings)  # the only pruning decision
            output = step.output(allow_missing=self.missing == "nan")
        self._tell_end(step)
        return output

    def _refuse_tensors(self, *others: object, **options: object) -> None:
        """Refuses what the decoder computes for each token of the prompt and hands to its layers by another name."""
        given = ["one by position" for other in others if other is not None]
        given += [name for name, option in options.items() if isinstance(option, Tensor)]
        if given:
            raise UnsupportedModelError(
                f"{type(self.contract.decoder).__name__} hands its layers a tensor of its own ({', '.join(given)}), "
                "which lazyllm cannot cut to the tokens that are computed"
            )

    def _admit(self, cache: object, hidden: Tensor) -> LazyCache:
        """Refuses what cannot work before anything runs."""
        if not isinstance(cache, LazyCache):
            raise CacheError(
                f"the attached model needs past_key_values=pipe.new_cache(), got {type(cache).__name__}; "
                "transformers makes a cache of its own when none is given"
            )
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise InputError("lazyllm is for inference: call the model under torch.no_grad() or torch.inference_mode()")
        longest, length = self.contract.max_positions, cache.columns + (cache.prompt_left or hidden.shape[1])
        if longest is not None and length > longest and cache.is_prefill(hidden.shape[1]):
            raise InputError(f"the prompt has {length} tokens, the model has positions for {longest}")
        cache.bind(self.contract.decoder, self.contract.adapters)
        return cache

    def _plan(
        self,
        step: Step,
        view: LayerView,
        layer: int,
        masks: RowMasks,
        captured: Captured | None,
    ) -> AttentionPlan:
        """How this layer attends: row by row, with a mask only where the kernel needs one."""
        window = self.contract.windows[layer]
        rows = []
        start = 0
        for index, todo in enumerate(view.todo):
            if not todo.numel():
                continue
            queries = slice(start, start := start + todo.numel())
            attended, positions = partial(view.attended, index), step.token_positions[index]
            new, reach = step.new_among(index, todo), step.rows[index].ledger.reach
            rows.append(
                RowPlan(
                    row=index,
                    queries=queries,
                    query_tokens=todo,
                    read_key_tokens=attended,
                    new_queries=new,
                    positions=positions,
                    read_spans=partial(masks.spans, index, todo, attended, positions, window, new=new, reach=reach),
                    reach=reach,
                )
            )
        contract = self.contract
        return AttentionPlan(rows, contract.kernel, window, captured, ranks=contract.ranks)

    def _peek(
        self, step: Step, layer: int, visible: list[Tensor], masks: RowMasks, options: dict[str, Any]
    ) -> Captured:
        """The queries and keys that `layer` would use were all of `visible` to enter it; nothing is computed beyond.

        Where the cache revives nothing, tokens that stopped before `layer` in an earlier step cannot enter it.
        """
        if not step.cache.policy.revives:
            visible = [step.without_stopped(row, layer, tokens) for row, tokens in enumerate(visible)]
        todo, states = step.peek(visible, layer)
        hidden = self.contract.to_layer(states, layer)
        positions = step.positions(todo)
        rope = self.contract.rope(hidden, step.rope_positions(positions, todo))[self.contract.rope_types[layer]]
        view = step.view_of(layer, todo, visible).peeking()
        plan = self._plan(step, view, layer, masks, captured := Captured())
        plan.peeks = True
        with suppress(Peeked):
            packed = Packed(hidden, positions, self.contract.to_layer(rope, layer))
            run_layer(self.layers[layer], packed, plan, view, options)
        return captured

    def _tell_start(self, step: Step) -> None:
        if step.is_prefill:
            event = PrefillStart(tuple(step.new[place].numel() for place in step.places), len(self.layers))
            for callback in self.callbacks:
                callback.on_prefill_start(event)

    def _tell_piece(self, step: Step, layer: int, place: slice) -> None:
        if self.callbacks:
            event = PieceEnd(layer, len(self.layers), step.is_prefill, place.stop - place.start)
            for callback in self.callbacks:
                callback.on_piece_end(event)

    def _tell_layer(self, step: Step, view: LayerView, layer: int, visible: list[Tensor]) -> None:
        if not self.callbacks:
            return
        traces = [
            RowTrace(
                visible=seen,
                computed=todo,
                attended=view.attended(index),
                first_new=len(row.ledger) - new.numel(),
                choice=step.choices.get(index),
            )
            for index, (row, seen, todo, new) in enumerate(zip(step.rows, visible, view.todo, step.new, strict=True))
        ]
        rows = tuple(
            traces[place] if place not in step.places[:index] else replace(traces[place], shared=True)
            for index, place in enumerate(step.places)
        )
        event = LayerEnd(layer=layer, layers=len(self.layers), is_prefill=step.is_prefill, rows=rows)
        for callback in self.callbacks:
            callback.on_layer_end(event)

    def _tell_end(self, step: Step) -> None:
        if not self.callbacks:
            return
        event = StepEnd(
            is_prefill=step.is_prefill,
            context_tokens=tuple(len(step.rows[place].ledger) for place in step.places),
            new_tokens=tuple(step.new[place].numel() for place in step.places),
            kv_bytes=step.cache.kv_bytes,
            aux_bytes=step.cache.aux_bytes,
        )
        for callback in self.callbacks:
            callback.on_step_end(event)
