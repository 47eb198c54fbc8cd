"""One prompt and its reply as a page: how deep each token was computed, by which scores, and what came back later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lazyllm.errors import InputError
from lazyllm.generation.result import GenerationResult, GenerationStats
from lazyllm.models.names import CACHE_NAMES
from lazyllm.pages.pieces import prompt_pieces, reply_pieces
from lazyllm.pages.render import as_numbers, render, save
from lazyllm.pages.trace import Cut, Flags, Ints, Recorder, StepTrace
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query, query_tokens
from lazyllm.prompts import EncodedPrompt, Prompt, is_batch


@dataclass(frozen=True)
class Inspection:
    """One generation, token by token.

    Attributes:
        model: name of the model.
        settings: by field of the configuration, what it says.
        token_ids, pieces: [t] the prompt's tokens and their texts.
        protected, query: [t] which of them were never left out, and which ask.
        steps: the prefill, then every later step.
        cuts: by which scores tokens were chosen in prefill.
        reply: by new token, the text it adds.
        stats: what it cost.
    """

    model: str
    settings: dict[str, str]
    token_ids: list[int]
    pieces: list[str]
    protected: Flags
    query: Flags
    steps: list[StepTrace]
    cuts: list[Cut]
    reply: list[str]
    stats: GenerationStats

    @property
    def depths(self) -> list[Ints]:
        """By step, how many layers have computed each token [t] of the prompt so far."""
        return [step.depths[: len(self.token_ids)] for step in self.steps]


def inspect(
    pipe: LazyPipeline,
    prompt: Prompt,
    path: str | Path,
    *,
    query: Query | None = None,
    title: str | None = None,
    **options: Any,
) -> Path:
    """Generates a reply to one prompt and writes a page that shows what was computed for it.

    Args:
        pipe: the pipeline; its own callbacks are told too.
        prompt: a string, token ids or chat messages.
        path: the HTML file to write.
        query: what the prompt asks, as in `generate`.
        title: of the page; without one it says how long the prompt is, and what model it went through.
        options: those of `generate`; one reply, without beams.

    Raises:
        InputError: for a batch, several replies, or a file that cannot be written.
    """
    return save_inspection(record(pipe, prompt, query=query, **options), path, title=title)


def record(pipe: LazyPipeline, prompt: Prompt, *, query: Query | None = None, **options: Any) -> Inspection:
    """Generates a reply to one prompt and notes what was computed for it.

    Raises:
        InputError: for a batch, several replies, or a cache that holds something already.
    """
    _check_single(pipe, prompt, options)
    encoded = pipe.encode(prompt, query=query)
    cache = pipe.new_cache()
    recorder = Recorder(cache)
    callbacks = [*pipe.callbacks, recorder]
    watched = LazyPipeline.from_config(pipe.config, pipe.model, pipe.tokenizer, callbacks=callbacks)
    result = watched.generate(prompt, query=query, past_key_values=cache, **options)
    assert isinstance(result, GenerationResult)
    return _inspection(pipe, encoded, recorder, result)


def _check_single(pipe: LazyPipeline, prompt: Prompt, options: dict[str, Any]) -> None:
    if is_batch(prompt):
        raise InputError("a page shows one prompt, not a batch")
    if taken := [name for name in CACHE_NAMES if name in options]:
        raise InputError(f"a page shows a generation from its start; leave {taken[0]} out")
    defaults = options.get("generation_config") or pipe.model.generation_config
    for name in ("num_return_sequences", "num_beams"):
        number = options.get(name, getattr(defaults, name, None))
        if (number or 1) > 1:
            raise InputError(f"a page shows one reply, not {name}={number}")


def _inspection(pipe: LazyPipeline, encoded: EncodedPrompt, recorder: Recorder, result: GenerationResult) -> Inspection:
    prefill = [step for step in recorder.steps if step.is_prefill]
    later = recorder.steps[len(prefill) :]
    cuts = {layer: cut for step in prefill for layer, cut in step.cuts.items()}
    return Inspection(
        model=Path(getattr(pipe.model.config, "name_or_path", "")).name or type(pipe.model).__name__,
        settings={name: str(getattr(pipe.config, name)) for name in ("scorer", "schedule", "cache", "protect")},
        token_ids=encoded.token_ids,
        pieces=prompt_pieces(encoded, pipe.tokenizer),
        protected=recorder.protected,
        query=_query(pipe, encoded),
        steps=[prefill[-1], *later],
        cuts=[cuts[layer] for layer in sorted(cuts)],
        reply=reply_pieces(result.token_ids, pipe.tokenizer),
        stats=result.stats,
    )


def _query(pipe: LazyPipeline, encoded: EncodedPrompt) -> Flags:
    """Which tokens [t] the scorer looked back from, or the prompt was said to ask with."""
    asked = pipe.config.scorer.reads_query
    mask = torch.zeros(len(encoded.token_ids), dtype=torch.bool)
    if asked is not None or encoded.marks.query:
        mask[query_tokens(asked or "auto", encoded.marks.query, len(mask), rolling=False)] = True
    return mask.numpy()


# -- the page --------------------------------------------------------------------------------------


def save_inspection(inspection: Inspection, path: str | Path, *, title: str | None = None) -> Path:
    """Writes the page of a generation; the same bytes for the same one.

    Raises:
        InputError: when the file cannot be written.
    """
    stats = inspection.stats
    html = render(
        "inspect",
        title=title or f"{stats.prompt_tokens:,} prompt tokens through {inspection.model}",
        data=_page_data(inspection),
        inspection=inspection,
        figures=list(_figures(stats)),
    )
    return save(html, path)


def _figures(stats: GenerationStats) -> Iterator[tuple[str, str, str]]:
    """Name, value and meaning of what stands on top of the page."""
    seconds = stats.seconds_per_output_token
    yield "computed in prefill", f"{stats.prefill_computed_fraction:.1%}", "layer-tokens computed, of a dense prefill"
    yield "computed in all", f"{stats.computed_fraction:.1%}", "layer-tokens computed, of a dense run"
    yield "predicted speedup", f"{stats.predicted_speedup:.2f}×", "operations of a dense prefill over those done"
    yield "TTFT", f"{stats.ttft_seconds:.2f} s", "time to the first token"
    yield "per token", "–" if seconds is None else f"{1000 * seconds:.0f} ms", "mean time between new tokens"
    yield "revived", f"{stats.revived_tokens:,}", "layer-tokens computed after the prefill for tokens of earlier steps"


def _page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page's script reads."""
    depths = inspection.depths
    return {
        "layers": inspection.stats.layers,
        "ids": inspection.token_ids,
        "pieces": inspection.pieces,
        "marks": as_numbers(inspection.protected + 2 * inspection.query.astype(np.uint8), "u1"),
        "depths": as_numbers(depths[0], "u2"),
        "cuts": [_cut_data(cut) for cut in inspection.cuts],
        "steps": [
            _step_data(step, changes, len(inspection.token_ids))
            for step, changes in zip(inspection.steps, [[], *_changes(depths)], strict=True)
        ],
        "reply": inspection.reply,
    }


def _cut_data(cut: Cut) -> dict[str, Any]:
    return {
        "layer": cut.layer,
        "candidates": cut.candidates,
        "scores": as_numbers(cut.scores, "f4"),
        "ranks": as_numbers(cut.ranks, "u4"),
        "entered": as_numbers(cut.entered, "u1"),
    }


def _changes(depths: Sequence[Ints]) -> Iterator[list[list[int]]]:
    """From each step to the next: token, depth before and depth after of those that changed."""
    for before, after in pairwise(depths):
        changed = np.flatnonzero(before != after)
        yield np.stack([changed, before[changed], after[changed]], axis=1).tolist()


def _step_data(step: StepTrace, changes: list[list[int]], prompt_tokens: int) -> dict[str, Any]:
    return {
        "kv": step.kv_bytes,
        "aux": step.aux_bytes,
        "changes": changes,
        "revived": [] if step.is_prefill else step.revived[step.revived < prompt_tokens].tolist(),
        "revivals": [[one.token, one.layer, one.score, one.rank, one.candidates] for one in step.revivals],
    }
