"""Any interleaving of turns, undoing, forks, files, crops and failures keeps the laws, and the conversation whole."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lazyllm import AuxCache, Callback, Constant, Conversation, DropCache, LastTokenAttention, OffloadedAux, TokenTrace
from lazyllm.callbacks import LayerEnd, RowTrace
from lazyllm.contexts.prefixes import held_ids
from tests.histories import policies
from tests.replay import replay
from tests.talks import DOCUMENT, FORGETFUL, TOOLS_FIRST, TOOLS_LAST, TURNS, WORDS, pipeline
from tests.tiny import LAYERS

MOST_CHATS = 3
TOLERANCE = 1e-10
QUESTIONS = st.lists(st.sampled_from([*WORDS[:20], "?", "assistant"]), min_size=1, max_size=8).map(" ".join)
DENSE = {"scorer": LastTokenAttention(), "schedule": Constant(1.0), "cache": AuxCache()}


@dataclass
class Talk:
    """A conversation with what was done for the tokens it holds."""

    chat: Conversation
    steps: list[list[LayerEnd]] = field(default_factory=list)

    def keep(self, tokens: int) -> None:
        """Forgets what was done for later tokens."""
        self.steps = [[without(event, tokens) for event in step] for step in self.steps]

    def fork(self) -> "Talk":
        return Talk(self.chat.fork(), list(self.steps))


def without(event: LayerEnd, tokens: int) -> LayerEnd:
    """The event without tokens from `tokens` on; what a surviving token attended never came after it."""
    row = event.rows[0]
    parts = (part[part < tokens] for part in (row.visible, row.computed, row.attended))
    return LayerEnd(event.layer, event.layers, event.is_prefill, (RowTrace(*parts, row.first_new),))


@contextmanager
def logits_of(model):
    """What a model's head returns, [1, vocabulary] each, in its own dtype."""
    seen = []
    hook = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output[0, -1:]))
    try:
        yield seen
    finally:
        hook.remove()


class Talks(RuleBasedStateMachine):
    """Drives conversations and their forks the way people do."""

    @initialize(
        chosen=policies(),
        cache=st.sampled_from(
            [AuxCache(), AuxCache(decode="reuse"), AuxCache(attend="cached"), AuxCache(max_revived=1), OffloadedAux(),
             DropCache()]
        ),
        template=st.sampled_from([TURNS, FORGETFUL, TOOLS_FIRST, TOOLS_LAST]),
        tools=st.booleans(),
        dense=st.booleans(),
        overflow=st.sampled_from(["error", "slide"]),
    )  # fmt: skip
    def start(self, chosen, cache, template, tools, dense, overflow):
        self.dense = dense
        self.pipe = pipeline(template, **(DENSE if dense else {**chosen, "cache": cache}))
        chat = self.pipe.conversation(
            documents=DOCUMENT, system="w60 w61", tools=[{"name": "w50"}] * tools, overflow=overflow
        )
        self.talks, self.turn = [Talk(chat)], 0

    @property
    def talk(self) -> Talk:
        return self.talks[self.turn]

    @rule(text=QUESTIONS, new_tokens=st.integers(1, 5))
    def ask(self, text, new_tokens):
        talk, trace = self.talk, TokenTrace()
        held = talk.chat.cache.columns
        with logits_of(self.pipe.model) as logits:
            reply = talk.chat.ask(text, max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, callbacks=[trace])
        turn = talk.chat.turns[-1]
        assert held - turn.rewritten_tokens == reply.stats.reused_tokens
        talk.keep(reply.stats.reused_tokens)
        talk.steps += trace.steps
        self.check_replay(talk, reply, torch.cat(logits))
        if self.dense:
            fresh = self.fresh(talk.chat, max_new_tokens=new_tokens)
            assert fresh == reply.token_ids

    def check_replay(self, talk, reply, got):
        ids, first = held_ids(talk.chat.cache), reply.stats.prompt_tokens - 1
        expected, _ = replay(self.pipe.model, ids, talk.steps, 0)
        assert got.argmax(-1).tolist() == reply.token_ids
        torch.testing.assert_close(got, expected[first : first + len(got)], rtol=0, atol=TOLERANCE)

    def fresh(self, chat, **options):
        """The reply of a call that knows nothing of the conversation."""
        tools, tokenizer = list(chat.opening.tools), self.pipe.tokenizer
        text = tokenizer.apply_chat_template(
            chat.messages[:-1], tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return self.pipe.generate(ids, do_sample=False, eos_token_id=-1, **options).token_ids

    @rule(text=QUESTIONS, layer=st.integers(0, LAYERS - 1), step=st.integers(0, 2), streams=st.booleans())
    def fail_in_the_middle(self, text, layer, step, streams):
        class Boom(Callback):
            steps = 0

            def on_layer_end(self, event):
                if event.layer == layer and self.steps == step:
                    raise KeyboardInterrupt

            def on_step_end(self, event):
                self.steps += 1

        chat = self.talk.chat
        before, cache, columns = chat.messages, chat.cache, chat.cache.columns
        depths = [row.ledger.depth.clone() for row in cache.rows]
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "callbacks": [Boom()]}
        with pytest.raises(KeyboardInterrupt):
            list(chat.stream(text, **options)) if streams else chat.ask(text, **options)
        assert chat.messages == before
        assert chat.cache is cache
        assert cache.columns == columns
        assert all(torch.equal(row.ledger.depth, depth) for row, depth in zip(cache.rows, depths, strict=True))

    @precondition(lambda self: self.talk.chat.turns)
    @rule()
    def undo(self):
        chat = self.talk.chat
        removed = [chat.turns[-1].asked, chat.turns[-1].reply]
        before, turns = held_ids(chat.cache).tolist(), len(chat.turns)
        assert chat.undo() == removed
        assert len(chat.turns) == turns - 1
        after = held_ids(chat.cache).tolist()
        assert before[: len(after)] == after
        self.talk.keep(len(after))

    @precondition(lambda self: self.talk.chat.cache.columns)
    @rule(columns=st.integers(0, 9))
    def crop(self, columns):
        cache = self.talk.chat.cache
        cache.crop(-min(columns, cache.columns))
        self.talk.keep(cache.columns)

    @precondition(lambda self: len(self.talks) < MOST_CHATS)
    @rule()
    def fork(self):
        self.talks.append(self.talk.fork())

    @precondition(lambda self: len(self.talks) > 1)
    @rule(turn=st.integers(0, MOST_CHATS - 1))
    def go_on_with_another(self, turn):
        self.turn = turn % len(self.talks)

    @rule()
    def save_and_load(self):
        chat = self.talk.chat
        with TemporaryDirectory() as folder:
            loaded = self.pipe.load_conversation(chat.save(Path(folder) / "a chat"))
        assert (loaded.messages, loaded.turns, loaded.opening) == (chat.messages, chat.turns, chat.opening)
        self.talk.chat = loaded

    @invariant()
    def the_laws_hold(self):
        for talk in getattr(self, "talks", []):
            self.check(talk)

    @staticmethod
    def check(talk: Talk):
        cache = talk.chat.cache
        for row in cache.rows:
            depth = row.ledger.depth
            for layer, store in enumerate(row.stores):
                assert sorted(store.tokens.tolist()) == torch.nonzero(depth > layer).flatten().tolist()
            waiting = torch.nonzero(depth < LAYERS).flatten() if cache.policy.revives else torch.tensor([])
            assert row.frontier.tokens.tolist() == waiting.tolist()
            work = [
                (event.layer, token)
                for step in talk.steps
                for event in step
                for token in event.rows[0].computed.tolist()
            ]
            assert len(work) == len(set(work)) == int(depth.sum())


Talks.TestCase.settings = settings(stateful_step_count=10)
TestTalks = Talks.TestCase
