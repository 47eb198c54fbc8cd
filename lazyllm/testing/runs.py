"""A batch on its way through prefill, decode and a further turn, with everything that must hold at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lazyllm.caches.row import PromptMarks
from lazyllm.callbacks import Callback, TokenTrace
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.protect import Protect
from lazyllm.testing.models import VOCABULARY
from lazyllm.testing.rules import require

LENGTHS = (30, 23)
"""Tokens of the prompts of the batch."""
LATER = (1, 1, 6, 1)
"""Tokens of each further step: a reply, a further turn, a reply."""
PROTECT = Protect(sinks=2, recent=2)
UNITS = (0, 6, 15, 21)
MARKS = PromptMarks(
    protected=((9, 11),),
    query=((5, 8),),
    asked=True,
    starts={"line": UNITS, "sentence": UNITS, "paragraph": UNITS},
)
CLOSE = 1e-6
"""How far numbers of the same run in another batch may differ: norms of the models work in float32."""

Ids = Sequence[Sequence[Tensor]]
"""By row, by step, token ids [t]."""


class Interruption(Exception):
    """Raised in the middle of a step, to see what is left behind."""


class Interrupting(Callback):
    """Ends a step after the third layer."""

    def on_layer_end(self, event: Any) -> None:
        """Raises."""
        if event.layer == 2:
            raise Interruption


def batch_ids(seed: int = 0) -> Ids:
    """Two rows of random token ids, for a whole run."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in (prompt, *LATER)]
        for prompt in LENGTHS
    ]


class Run:
    """One batch in one cache.

    Attributes:
        pipe: its policies and its model.
        cache: what it has filled so far.
        trace: who was visible, computed and attended, by step and layer.
        logits: by step, by row, logits [t, vocabulary] of the step's tokens; NaN where they were pruned.
        lengths: by step, by row, how many tokens the row then had.
    """

    def __init__(self, pipe: LazyPipeline, *, rows: int, marks: PromptMarks = MARKS) -> None:
        self.pipe, self.trace = pipe, TokenTrace()
        self.cache = pipe.new_cache(marks=[marks] * rows)
        self.logits: list[list[Tensor]] = []
        self.lengths: list[list[int]] = []
        self._real = torch.zeros(rows, 0, dtype=torch.long)

    def fork(self) -> Run:
        """The same run with a copy of its cache; it goes on by itself."""
        twin = Run(self.pipe, rows=self._real.shape[0])
        twin.cache, twin._real = self.cache.fork(), self._real
        return twin

    def play(self, ids: Ids) -> Run:
        """Runs all steps of `ids`."""
        for step in zip(*ids, strict=True):
            self.step(step)
        return self

    def step(self, tokens: Sequence[Tensor], *, callbacks: Sequence[Callback] = ()) -> None:
        """One step with ids [t] for each row; shorter rows are padded on the left."""
        width = max(row.numel() for row in tokens)
        ids = torch.stack([torch.nn.functional.pad(row, (width - row.numel(), 0)) for row in tokens])
        real = torch.stack([(torch.arange(width) >= width - row.numel()).long() for row in tokens])
        mask = torch.cat([self._real, real], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -width:]
        with torch.no_grad(), self.pipe.attached(callbacks=[self.trace, *callbacks], missing="nan") as model:
            found = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: self.cache}).logits
        self.logits.append([found[row, chosen.bool()] for row, chosen in enumerate(real)])
        self.lengths.append([len(row.ledger) for row in self.cache.rows])
        self._real = mask

    def row(self, index: int) -> list[Tensor]:
        """Logits [t, vocabulary] of one row, by step."""
        return [step[index] for step in self.logits]

    def reorder(self, order: Sequence[int]) -> None:
        """Rows change places."""
        self.cache.reorder_cache(torch.tensor(order))
        self._real = self._real[list(order)]

    def crop(self, columns: int) -> None:
        """Takes the last columns out."""
        self.cache.crop(-columns)
        self._real = self._real[:, :-columns]


def check_steps(run: Run, policy: object) -> None:
    """The rules "nested", "protected" and "law 1" of everything that was run."""
    for index in range(len(run.cache.rows)):
        _check_visible(run, policy, index)
        _check_work(run, policy, index)


def _check_visible(run: Run, policy: object, index: int) -> None:
    forgets = run.pipe.config.cache.retreat is not None  # also protected tokens, until the next prefill
    reply_start = 0
    for number, (step, lengths) in enumerate(zip(run.trace.steps, run.lengths, strict=True)):
        length = lengths[index]
        reply_start = length if step[0].is_prefill else reply_start
        safe = safe_tokens(length, reply_start) if step[0].is_prefill or not forgets else set()
        before = set(range(length))
        for event in step:
            visible = set(event.rows[index].visible.tolist())
            where = f"at step {number}, layer {event.layer}, row {index}"
            back = sorted(visible - before)
            require(not back, "nested", policy, f"{where}, tokens {back} are visible again")
            left_out = sorted(safe - visible)
            require(not left_out, "protected", policy, f"{where}, the protected tokens {left_out} are left out")
            before = visible


def safe_tokens(length: int, reply_start: int) -> set[int]:
    """Tokens of a row that are protected while it has `length` tokens and its reply begins at `reply_start`."""
    named = [range(PROTECT.sinks), *(range(*span) for span in (*MARKS.protected, *MARKS.query))]
    latest = range(max(0, min(length - PROTECT.recent, reply_start)), length)
    return {token for span in (*named, latest) for token in span if token < length}


def _check_work(run: Run, policy: object, index: int) -> None:
    row = run.cache.rows[index]
    done = [
        (event.layer, token)
        for step in run.trace.steps
        for event in step
        for token in event.rows[index].computed.tolist()
    ]
    if run.pipe.config.cache.retreat is None:
        twice = sorted({work for work in done if done.count(work) > 1}) if len(set(done)) < len(done) else []
        require(not twice, "law 1", policy, f"row {index} computed (layer, token) {twice[:4]} again")
    said = int(row.ledger.depth.sum()) + row.retreated
    found = f"row {index} computed {len(done)} layer-tokens, its depths and what was given up say {said}"
    require(len(done) == said, "law 1", policy, found)


def difference(one: Sequence[Tensor], other: Sequence[Tensor]) -> str | None:
    """What differs first between two lists of tensors, up to rounding; None when nothing does."""
    for number, (left, right) in enumerate(zip(one, other, strict=True)):
        if left.shape != right.shape:
            return f"shape {tuple(left.shape)} and {tuple(right.shape)} at {number}"
        if not torch.allclose(left, right, rtol=CLOSE, atol=CLOSE, equal_nan=True):
            return f"up to {float((left - right).abs().nan_to_num(torch.inf).max()):.3g} at {number}"
    return None
