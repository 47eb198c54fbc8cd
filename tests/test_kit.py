"""The test kit: every registered policy passes it, and each of its rules is seen to catch a policy that breaks it."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from pydantic import ConfigDict, Field, PrivateAttr

from lazyllm import (
    CACHES,
    SCHEDULES,
    SCORERS,
    AccumulatedAttention,
    AuxCache,
    Blockwise,
    BudgetCache,
    CachePolicy,
    ConfigError,
    Constant,
    EvictingCache,
    Funnel,
    Random,
    Schedule,
    ScoreContext,
    Scorer,
    SinkRecent,
    Stages,
    WindowAttention,
)
from lazyllm.caches.frontier import FrontierStore
from lazyllm.caches.ledger import Ledger
from lazyllm.caches.row import Row
from lazyllm.caches.store import KeyValueStore
from lazyllm.policies import Keep
from lazyllm.policies.select import Selector
from lazyllm.testing import RULES, ContractViolation, check_cache, check_schedule, check_scorer
from lazyllm.testing.models import tiny_model
from tests.test_config import REQUIRED
from tests.test_scorers import FIELDS

# -- what is shipped passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_every_registered_scorer_keeps_the_rules(name: str):
    check_scorer(SCORERS.build({"name": name, **FIELDS.get(name, {})}))


# A tuned schedule serves the one model it was found for and refuses the kit's; tests/test_tuned.py has its own.
@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "Tuned"])
def test_every_registered_schedule_keeps_the_rules(name: str):
    check_schedule(SCHEDULES.build({"name": name, **REQUIRED.get(name, {})}))


REACHED: dict[str, dict[str, Any]] = {"BudgetCache": {"tokens": 9, "sinks": 1}, "EvictingCache": {"budget": 12}}
"""Bounds that 40 tokens reach."""


@pytest.mark.parametrize("name", CACHES)
def test_every_registered_cache_keeps_the_rules(name: str):
    check_cache(CACHES.build({"name": name, **REACHED.get(name, {})}))


def test_several_are_checked_at_once_and_units_of_text_are_known():
    check_scorer(Blockwise(SinkRecent(), "sentence"), WindowAttention(window=3, pool=3, heads="max"))
    check_schedule(Stages({1: 0.9, 0.5: 0.2}), Stages({30: 0.5}))
    check_cache(
        AuxCache(attend="cached", max_revived=2, revive_every=2),
        EvictingCache(scorer=AccumulatedAttention(), budget=9, when="decode", every=2),
    )


# -- what breaks a rule is caught ---------------------------------------------------------------------------


class Base(Scorer):
    """Later tokens score higher."""

    def score(self, context: ScoreContext):
        return context.tokens.double()


class Settable(Base):
    model_config = ConfigDict(frozen=False)
    weight: float = 1.0


class Unwritten(Base):
    weight: float = Field(default=1.0, exclude=True)


class ReadsAttentionUnasked(Base):
    def score(self, context):
        return context.attention_to_visible(queries=1).mean(dim=(0, 1))


class NeedsThreeTokens(Base):
    def score(self, context):
        return context.tokens.double() + context.tokens[4] * 0


class RemembersTheLongest(Base):
    longest: ClassVar[list[int]] = [0]

    def score(self, context):
        self.longest[0] = max(self.longest[0], context.context_tokens)
        return context.tokens.double() * self.longest[0]


class CountsCalls(Base):
    _calls: list[int] = PrivateAttr(default_factory=lambda: [0])

    def score(self, context):
        self._calls[0] += 1
        return context.tokens.double()


class TrainsTheModel(Base):
    def check_model(self, model, tokenizer):
        model.get_decoder().layers[0].train()


class ScalesTheModel(Base):
    def check_model(self, model, tokenizer):
        model.get_decoder().layers[0].self_attn.q_proj.weight.mul_(1.5)


class OneTooMany(Base):
    def score(self, context):
        return torch.zeros(context.tokens.numel() + 1)


class Everything(Base):
    def score(self, context):
        return torch.zeros(context.context_tokens)


class NoTensor(Base):
    def score(self, context):
        return [0.0] * context.tokens.numel()


class Whole(Base):
    def score(self, context):
        return context.tokens


class Dividing(Base):
    def score(self, context):
        scores = (context.tokens % 7).double()
        return 1 / scores


class Standardising(Base):
    needs_memory: ClassVar[bool] = True

    def score(self, context):
        states = context.states_of(context.tokens)
        return ((states - states.mean(0)) / states.std(0, correction=0)).sum(-1)


class Rolling(Base):
    def score(self, context):
        return torch.rand(context.tokens.numel())


class ZeroesStates(Base):
    def score(self, context):
        return context.states.mul_(0.5).sum() + context.tokens.double()


class ShiftsKeys(Base):
    needs_attention: ClassVar[bool] = True

    def score(self, context):
        return context.layer_attention.keys.add_(1).sum() + context.tokens.double()


class SortsTokens(Base):
    def score(self, context):
        return context.tokens.sub_(1).double()


class NormalisesFeatures(Base):
    needs_memory: ClassVar[bool] = True

    def features(self, states, update):
        return states.div_(states.norm(dim=-1, keepdim=True))


class KeepsLess(Base):
    needs_memory: ClassVar[bool] = True

    def features(self, states, update):
        return states[:, :3]


class KeepsNaN(Base):
    needs_memory: ClassVar[bool] = True

    def features(self, states, update):
        return states / 0


class ObservesHeads(Base):
    needs_attention: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def observe(self, attention):
        return attention.received()


class ObservesNothing(Base):
    needs_attention: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    def observe(self, attention):
        return torch.full((attention.key_tokens.numel(),), torch.nan)


class SeesTheBatch(Base):
    def score(self, context):
        alone = context.states.untyped_storage().nbytes() == context.states.nbytes
        return context.tokens.double() * (1 if alone else 2)


class Cutting(Schedule):
    """Cuts where it is told to."""

    at: dict[int, Annotated[float, Field(gt=-9)]]

    def cuts(self, layers, phase):
        return {layer: Keep(ratio) for layer, ratio in self.at.items()}


class Numbers(Schedule):
    def cuts(self, layers, phase):
        return {1: 0.5}


class Ratios(Schedule):
    ratios: tuple[float, ...]
    """The first of them, then the last one over and over."""

    def keep_ratios(self, layers):
        return [*self.ratios[:layers], *[self.ratios[-1]] * (layers - len(self.ratios))]


class TooFew(Schedule):
    def keep_ratios(self, layers):
        return [1.0] * (layers - 1)


class Silent(Schedule):
    pass


class Alternating(Schedule):
    asked: ClassVar[list[int]] = [0]

    def cuts(self, layers, phase):
        self.asked[0] += 1
        return {0: Keep(0.5 if self.asked[0] % 2 else 0.4)}


@dataclass(frozen=True)
class HalfOfThem(Keep):
    def free_tokens(self, scores, protected, context_tokens):
        return int((scores > scores.mean()).sum() // 2)


@dataclass(frozen=True)
class AllOfThem(Keep):
    adapts: ClassVar[bool] = True

    def free_tokens(self, scores, protected, context_tokens):
        return scores.numel()


@dataclass(frozen=True)
class NoLimit(Keep):
    def limit(self, context_tokens):
        return int(context_tokens * 0.2)


class Keeping(Schedule):
    keep: str

    def cuts(self, layers, phase):
        return {0: globals()[self.keep](0.5)}


class OneStore(AuxCache):
    store: ClassVar[KeyValueStore] = KeyValueStore()

    def new_store(self):
        return self.store


class Backwards(KeyValueStore):
    def gather(self, tokens):
        return super().gather(tokens.flip(0))


class ValuesAsKeys(KeyValueStore):
    def append(self, tokens, keys, values):
        super().append(tokens, values, keys)


class Forgetful(KeyValueStore):
    """Loses the first token once there are more than 20."""

    def append(self, tokens, keys, values):
        super().append(tokens, keys, values)
        if len(self) > 20:
            self.keep(torch.arange(1, len(self)))


class Unbounded(KeyValueStore):
    def keep(self, slots):
        pass


class Weightless(KeyValueStore):
    used_bytes = 0


class Uncropped(KeyValueStore):
    def crop(self, tokens):
        pass


class Shared(KeyValueStore):
    def copy(self):
        return self


class Unsaved(KeyValueStore):
    def state(self):
        state = super().state()
        return {**state, "keys": state["keys"] * 0} if state else {}


class Lasting(KeyValueStore):
    def truncate(self, length):
        pass


class Storing(AuxCache):
    kind: str

    def new_store(self):
        return globals()[self.kind]()


class Evicting(EvictingCache):
    def new_store(self):
        return Unbounded()


class Shuffled(FrontierStore):
    def read(self, tokens):
        return super().read(tokens).roll(1, 0)


class Lossy(FrontierStore):
    """Loses what is put in when it holds more than eight."""

    def put(self, tokens, states):
        super().put(tokens, states)
        if len(self) > 8:
            self.free(self.tokens[-1:])


class Waiting(AuxCache):
    kind: str

    def new_frontier(self):
        return globals()[self.kind]()


class Revived(AuxCache):
    """Says it does not revive, and keeps states."""

    revives: ClassVar[bool] = False

    def new_frontier(self):
        store = FrontierStore()
        store.put(torch.tensor([3]), torch.zeros(1, 32, dtype=torch.float64))
        return store


class Refusing(AuxCache):
    def check_model(self, model, tokenizer):
        raise ConfigError("no model is good enough")


def unprotected(*_: Any, **__: Any) -> Any:
    return torch.zeros(_[1].numel(), dtype=torch.bool)


def coming_back(select):
    """Selects, and takes token 3 up again after layer 1."""

    def narrowed(self, step, layer, visible, readings):
        chosen = select(self, step, layer, visible, readings)
        if layer != 1:
            return chosen
        return [torch.cat([tokens, torch.tensor([3])]).unique() if len(tokens) else tokens for tokens in chosen]

    return narrowed


def miscounting(advance):
    """Counts one token too many at depth 1."""

    def advanced(self, tokens, layer):
        advance(self, tokens, layer)
        self.at_depth[1] += layer == 0

    return advanced


def concealing(retreat):
    """Sends tokens back, and does not say so."""

    def retreated(self, most, layer, sinks):
        retreat(self, most, layer, sinks)
        self.retreated = 0

    return retreated


@dataclass(frozen=True)
class Broken:
    """A policy that breaks a rule, by itself or on machinery that is broken for it."""

    rule: str
    policy: Any
    part: str = ""
    patches: tuple[tuple[str, Any], ...] = ()


SELECT, MASK = "lazyllm.policies.select.Selector.select", "lazyllm.policies.protect.Protect.mask"
RETREAT, ADVANCE = "lazyllm.caches.row.Row.retreat", "lazyllm.caches.ledger.Ledger.advance"
BROKEN = [
    Broken("frozen", Settable(), "'weight'"),
    Broken("round trip", Unwritten(weight=2.0), "weight=1.0"),
    Broken("runs", ReadsAttentionUnasked(), "sets needs_attention"),
    Broken("runs", NeedsThreeTokens(), "on a prompt of"),
    Broken("runs", Silent(), "neither keep_ratios nor cuts"),
    Broken("runs", Stages({50: 0.5}), "refuses every model"),
    Broken("runs", Refusing(), "no model is good enough"),
    Broken("stateless", RemembersTheLongest(), "after another one"),
    Broken("stateless", CountsCalls(), "its fields were"),
    Broken("stateless", Alternating(), "when asked again"),
    Broken("untouched", TrainsTheModel(), "its mode"),
    Broken("untouched", ScalesTheModel(), "q_proj.weight"),
    Broken("shape", OneTooMany(), "wanted (30,), got (31,)"),
    Broken("shape", Everything(), "got (30,)"),
    Broken("shape", NoTensor(), "got [0.0"),
    Broken("dtype", Whole(), "torch.int64"),
    Broken("finite", Dividing(), "{0: inf, 7: inf"),
    Broken("finite", Standardising(), "nan"),
    Broken("deterministic", Rolling(), "asked again"),
    Broken("pure", ZeroesStates(), "context.states"),
    Broken("pure", ShiftsKeys(), "context.attention.keys"),
    Broken("pure", SortsTokens(), "context.tokens"),
    Broken("pure", NormalisesFeatures(), "`features` changes its states"),
    Broken("remembered", KeepsLess(), "(30, 32), got (30, 3)"),
    Broken("remembered", KeepsNaN(), "inf"),
    Broken("observed", ObservesHeads(), "got (4, 30)"),
    Broken("observed", ObservesNothing(), "nan"),
    Broken("rows", SeesTheBatch(), "row 0, in a batch and alone"),
    Broken("protected", Base(), "the protected tokens", ((MASK, unprotected),)),
    Broken("nested", Base(), "tokens [3] are visible again", ((SELECT, coming_back(Selector.select)),)),
    Broken("cuts", Cutting(at={99: 0.5}), "layer 99"),
    Broken("cuts", Cutting(at={0: 0.0}), "the ratio of layer 0 is 0.0"),
    Broken("cuts", Numbers(), "{1: 0.5}"),
    Broken("cuts", Keeping(keep="NoLimit"), "is 0"),
    Broken("ratios", Ratios(ratios=(1.0, 1.5)), "1.5"),
    Broken("ratios", TooFew(), "it gives 0"),
    Broken("falling", Ratios(ratios=(0.5, 0.75)), "rises from 0.5 to 0.75 at layer 1"),
    Broken("falling", Funnel((Constant(0.3, start=1), Constant(0.5, start=2))), "tokens at layer 1 to"),
    Broken("adapts", Keeping(keep="HalfOfThem"), "does not say that it adapts"),
    Broken("adapts", Keeping(keep="AllOfThem"), "leaves at most"),
    Broken("stores", OneStore(), "the same store twice"),
    Broken("stores", Storing(kind="Backwards"), "gathered keys"),
    Broken("stores", Storing(kind="ValuesAsKeys"), "keys"),
    Broken("stores", Waiting(kind="Shuffled"), "states read"),
    Broken("kept", Storing(kind="Forgetful"), "does not store them"),
    Broken("frontier", Waiting(kind="Lossy"), "there are states of"),
    Broken("bound", Evicting(budget=9), "9 are allowed"),
    Broken("bytes", Storing(kind="Weightless"), "kv_bytes is 0"),
    Broken("crop", Storing(kind="Uncropped"), "stores"),
    Broken("fork", Storing(kind="Shared"), "went on"),
    Broken("saved", Storing(kind="Unsaved"), "keys of layer 0"),
    Broken("failing step", Storing(kind="Lasting"), "has changed"),
    Broken("reorder", AuxCache(), "as rows 1, 0", (("lazyllm.LazyCache.reorder_cache", lambda *_: None),)),
    Broken("ledger", AuxCache(), "depths count", ((ADVANCE, miscounting(Ledger.advance)),)),
    Broken("law 1", BudgetCache(tokens=9), "what was given up", ((RETREAT, concealing(Row.retreat)),)),
]


def check(broken: Broken) -> None:
    kinds = {Scorer: check_scorer, Schedule: check_schedule, CachePolicy: check_cache}
    with ExitStack() as stack:
        for target, replacement in broken.patches:
            stack.enter_context(patch(target, replacement))
        next(check for kind, check in kinds.items() if isinstance(broken.policy, kind))(broken.policy)


@pytest.fixture
def restored() -> Iterator[None]:
    """Takes back what broken policies leave behind."""
    RemembersTheLongest.longest[0] = 0
    yield
    tiny_model.cache_clear()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: f"{broken.rule}: {type(broken.policy).__name__}")
def test_a_policy_that_breaks_a_rule_is_caught_by_its_name(broken: Broken):
    with pytest.raises(ContractViolation) as error:
        check(broken)
    assert error.value.rule == broken.rule, str(error.value)
    assert error.value.policy == str(broken.policy)
    for part in (str(broken.policy), f"{broken.rule!r}", RULES[broken.rule], broken.part):
        assert part in str(error.value)


def test_every_rule_is_seen_to_catch_something():
    assert {broken.rule for broken in BROKEN} == set(RULES)


def test_every_rule_is_in_the_docs():
    page = (Path(__file__).parents[1] / "docs" / "writing-a-policy.md").read_text(encoding="utf-8")
    table = page.partition("| rule | what is checked |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", table, re.MULTILINE)) == RULES


def test_a_policy_defined_in_a_function_is_told_where_to_be():
    class Local(Base):
        pass

    with pytest.raises(ContractViolation, match="at the top of a module"):
        check_scorer(Local())


def test_a_violation_is_an_assertion_error_and_what_is_no_policy_is_refused():
    with pytest.raises(AssertionError, match=r"got torch\.int64"):
        check_scorer(Base(), Whole())
    for check_one, wrong in ((check_scorer, Constant()), (check_schedule, Random()), (check_cache, AuxCache)):
        with pytest.raises(ConfigError, match="the check takes instances of"):
            check_one(wrong)
    with pytest.raises(ConfigError, match="4 layers or more, not 3"):
        check_scorer(Base(), layers=3)


def test_layers_make_deeper_models():
    deep = BudgetCache(tokens=9, layer=5)
    with pytest.raises(ContractViolation, match="layer 5 does not exist"):
        check_cache(deep)
    check_cache(deep, layers=6)
    with pytest.raises(ContractViolation, match="6 cannot run"):
        check_scorer(SCORERS.build("DraftModel(layers=6)"))


def test_the_kit_leaves_the_random_generator_alone():
    tiny_model.cache_clear()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_schedule(Constant(0.5))
    assert torch.equal(torch.rand(3), expected)


def test_the_kit_needs_no_test_runner():
    script = (
        "import sys; sys.modules.update(dict.fromkeys(('pytest', 'hypothesis', 'typer', 'rich', 'scipy', 'sklearn')))\n"
        "from lazyllm import Constant, SinkRecent\n"
        "from lazyllm.testing import check_schedule, check_scorer\n"
        "check_scorer(SinkRecent()); check_schedule(Constant(0.5))\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=root, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
