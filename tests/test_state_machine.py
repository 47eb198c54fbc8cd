"""Any interleaving of steps, reorders, crops, forks, trims, saving, failure and reset keeps ledger and logits right."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyllm import AuxCache, Callback, DropCache, OffloadedAux, PromptMarks, QuantizedAux, QuantizedKV
from lazyllm.callbacks import LayerEnd, RowTrace
from tests.histories import History, batches, new_history, policies
from tests.replay import replay, rounding_of
from tests.tiny import LAYERS, tiny_model

ROWS = 2
MOST_FORKS = 3


class Conversation(RuleBasedStateMachine):
    """Drives a cache and its forks, in turns, the way generation loops of every kind do."""

    @initialize(
        chosen=policies(),
        cache=st.sampled_from(
            [
                AuxCache(),
                AuxCache(decode="reuse"),
                AuxCache(attend="cached"),
                AuxCache(max_revived=1),
                AuxCache(max_revived=2, revive_every=2),
                OffloadedAux(),
                OffloadedAux(where="disk"),
                QuantizedAux(),
                QuantizedAux(bits=4, max_revived=1),
                QuantizedKV(),
                QuantizedKV(bits=4, attend="cached"),
                DropCache(),
            ]
        ),
        one_prompt=st.booleans(),
    )
    def start(self, chosen, cache, one_prompt):
        self.histories, self.turn = [new_history(tiny_model("llama"), cache=cache, **chosen)], 0
        if one_prompt:  # both rows are one until their tokens differ
            self.history.cache.marks = [PromptMarks()]

    @property
    def history(self) -> History:
        return self.histories[self.turn]

    @rule(step=batches(ROWS, 10), alike=st.booleans())
    def chunk(self, step, alike):
        self.run(*(part[:1].expand(ROWS, -1) if alike else part for part in step))

    @rule(token=st.integers(3, 50))
    def decode(self, token):
        self.run(torch.full((ROWS, 1), token), torch.ones(ROWS, 1, dtype=torch.long))

    def run(self, ids, real):
        history = self.history
        logits = history.step(ids, real)
        rounding = rounding_of(history.cache.policy)
        for row in range(ROWS):
            expected, _ = replay(
                history.pipe.model, torch.tensor(history.ids[row]), history.steps, row, rounding=rounding
            )
            held = history.tokens[-1][row]
            got = logits[row, held >= 0]
            reached = ~got.isnan().any(-1)
            assert reached[-1]
            torch.testing.assert_close(got[reached], expected[held[held >= 0]][reached], rtol=0, atol=1e-10)

    def has_tokens(self):
        return bool(self.history.ids)

    @precondition(has_tokens)
    @rule(order=st.lists(st.integers(0, ROWS - 1), min_size=ROWS, max_size=ROWS))
    def reorder(self, order):
        history = self.history
        history.cache.reorder_cache(torch.tensor(order))
        history.ids = [list(history.ids[row]) for row in order]
        history.mask = history.mask[order]
        history.trace.steps = [[self.pick(event, order) for event in step] for step in history.trace.steps]

    @staticmethod
    def pick(event: LayerEnd, order: list[int]) -> LayerEnd:
        return LayerEnd(event.layer, event.layers, event.is_prefill, tuple(event.rows[row] for row in order))

    @precondition(has_tokens)
    @rule(columns=st.integers(0, 6))
    def crop(self, columns):
        history = self.history
        columns = min(columns, history.cache.columns)
        history.cache.crop(-columns)
        keep = history.mask.shape[1] - columns
        history.mask = history.mask[:, :keep]
        lengths = history.mask.sum(1).tolist()
        history.ids = [ids[:length] for ids, length in zip(history.ids, lengths, strict=True)]
        history.trace.steps = [[self.without(event, lengths) for event in step] for step in history.trace.steps]

    @staticmethod
    def without(event: LayerEnd, lengths: list[int]) -> LayerEnd:
        """The event without cropped tokens; what a surviving token attended never came after it."""
        rows = tuple(
            RowTrace(*(part[part < length] for part in (row.visible, row.computed, row.attended)), row.first_new)
            for row, length in zip(event.rows, lengths, strict=True)
        )
        return LayerEnd(event.layer, event.layers, event.is_prefill, rows)

    @precondition(lambda self: self.has_tokens() and len(self.histories) < MOST_FORKS)
    @rule()
    def fork(self):
        self.histories.append(self.history.fork())

    @precondition(lambda self: len(self.histories) > 1)
    @rule(turn=st.integers(0, MOST_FORKS - 1))
    def go_on_with_another(self, turn):
        self.turn = turn % len(self.histories)

    @rule()
    def trim(self):
        self.history.cache.trim()

    @rule()
    def save_and_load(self):
        history = self.history
        with TemporaryDirectory() as folder:
            history.cache = history.pipe.load_cache(history.cache.save(Path(folder) / "a cache"))

    @precondition(has_tokens)
    @rule(layer=st.integers(0, LAYERS - 1), step=batches(ROWS, 8))
    def fail_in_the_middle(self, layer, step):
        class Boom(Callback):
            def on_layer_end(self, event):
                if event.layer == layer:
                    raise RuntimeError("boom")

        history = self.history
        before = [row.ledger.depth.clone() for row in history.cache.rows]
        remembered = [self.remembered(row) for row in history.cache.rows]
        bytes_before = (history.cache.kv_bytes, history.cache.aux_bytes, history.cache.columns)
        ids, real = step
        mask = torch.cat([history.mask, real], dim=1)
        with (
            pytest.raises(RuntimeError, match="boom"),
            torch.no_grad(),
            history.pipe.attached(callbacks=[Boom()], missing="nan") as model,
        ):
            model(ids, attention_mask=mask, past_key_values=history.cache)
        assert bytes_before == (history.cache.kv_bytes, history.cache.aux_bytes, history.cache.columns)
        for row, depth in zip(history.cache.rows, before, strict=True):
            assert torch.equal(row.ledger.depth, depth)
        for row, lengths in zip(history.cache.rows, remembered, strict=True):
            assert self.remembered(row) == lengths

    @staticmethod
    def remembered(row) -> dict[int, int]:
        return {layer: len(memory) for layer, memory in row.memories.items() if len(memory)}

    @precondition(has_tokens)
    @rule()
    def reset(self):
        history = self.history
        history.cache.reset()
        history.ids, history.mask = [], None
        history.trace.steps = []

    @invariant()
    def ledger_and_stores_agree(self):
        for history in getattr(self, "histories", []):
            self.check(history)

    @staticmethod
    def check(history: History):
        for row, ids in zip(history.cache.rows, history.ids, strict=True):
            depth = row.ledger.depth
            assert len(row.ledger) == len(ids)
            assert row.ledger.at_depth == torch.bincount(depth, minlength=LAYERS + 1).tolist()
            for layer, store in enumerate(row.stores):
                assert sorted(store.tokens.tolist()) == torch.nonzero(depth > layer).flatten().tolist()
            if history.cache.policy.revives:
                assert torch.equal(row.frontier.tokens, torch.nonzero(depth < LAYERS).flatten())
            else:
                assert len(row.frontier) == 0
            for layer, memory in row.memories.items():
                remembered = torch.nonzero(depth > layer).flatten()
                assert len(memory) == remembered.numel()
                assert not remembered.numel() or memory.gather(remembered).shape[0] == remembered.numel()


Conversation.TestCase.settings = settings(stateful_step_count=12)
TestConversation = Conversation.TestCase
