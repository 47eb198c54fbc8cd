"""Any interleaving of prefill, chunk, decode, reorder, crop, copy, failure and reset keeps ledger and logits right."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyllm import AuxCache, Callback, DropCache
from lazyllm.callbacks import LayerEnd, RowTrace
from tests.histories import batches, new_history, policies
from tests.replay import replay
from tests.tiny import LAYERS, tiny_model

ROWS = 2


class Conversation(RuleBasedStateMachine):
    """Drives one cache the way generation loops of every kind do."""

    @initialize(
        chosen=policies(),
        cache=st.sampled_from(
            [
                AuxCache(),
                AuxCache(decode="reuse"),
                AuxCache(attend="cached"),
                AuxCache(max_revived=1),
                AuxCache(max_revived=2, revive_every=2),
                DropCache(),
            ]
        ),
    )
    def start(self, chosen, cache):
        self.history = new_history(tiny_model("llama"), cache=cache, **chosen)

    @rule(step=batches(ROWS, 10))
    def chunk(self, step):
        self.run(*step)

    @rule(token=st.integers(3, 50))
    def decode(self, token):
        self.run(torch.full((ROWS, 1), token), torch.ones(ROWS, 1, dtype=torch.long))

    def run(self, ids, real):
        history = self.history
        logits = history.step(ids, real)
        for row in range(ROWS):
            expected, _ = replay(history.pipe.model, torch.tensor(history.ids[row]), history.steps, row)
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

    @precondition(has_tokens)
    @rule()
    def continue_on_a_copy(self):
        original = self.history.cache
        self.history.cache = original.copy()
        original.reset()

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
        if not hasattr(self, "history"):
            return
        for row, ids in zip(self.history.cache.rows, self.history.ids, strict=True):
            depth = row.ledger.depth
            assert len(row.ledger) == len(ids)
            assert row.ledger.at_depth == torch.bincount(depth, minlength=LAYERS + 1).tolist()
            for layer, store in enumerate(row.stores):
                assert sorted(store.tokens.tolist()) == torch.nonzero(depth > layer).flatten().tolist()
            if self.history.cache.policy.revives:
                assert torch.equal(row.frontier.tokens, torch.nonzero(depth < LAYERS).flatten())
            else:
                assert len(row.frontier) == 0
            for layer, memory in row.memories.items():
                remembered = torch.nonzero(depth > layer).flatten()
                assert len(memory) == remembered.numel()
                assert not remembered.numel() or memory.gather(remembered).shape[0] == remembered.numel()


Conversation.TestCase.settings = settings(stateful_step_count=10)
TestConversation = Conversation.TestCase
