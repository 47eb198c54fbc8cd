"""The check of scorers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor
from transformers import PreTrainedModel

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.drop_cache import DropCache
from lazyllm.caches.row import PromptMarks
from lazyllm.models.attention import AttentionInputs
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.schedules import Stages
from lazyllm.policies.scorers.composed import ComposedScorer
from lazyllm.testing.models import LEAST_LAYERS, VOCABULARY, tiny_models, untouched
from lazyllm.testing.rules import check_kind, check_value, require, running, stateless
from lazyllm.testing.runs import MARKS, PROTECT, Interrupting, Interruption, Run, batch_ids, check_steps, difference

STAGES: dict[int | float, float] = {1: 0.7, 2: 0.5, 3: 0.3}
FROM_EMBEDDINGS: dict[int | float, float] = {0: 0.8, **STAGES}
SHORT = (1, 2, 3, 6)
"""Tokens of the shortest prompts that are tried."""
UNITS = PromptMarks(starts=MARKS.starts)


def check_scorer(*scorers: Scorer, layers: int = LEAST_LAYERS) -> None:
    """Checks scorers on tiny models: prefill, decode, a further turn, batches, and prompts of one to six tokens.

    Args:
        scorers: instances; the smaller their windows and pools, the more a prompt of 30 tokens shows.
        layers: layers of the models, for scorers that name a layer.

    Raises:
        ContractViolation: for the first rule that is broken.
        ConfigError: for what is no scorer.
    """
    for scorer in scorers:
        check_kind(scorer, Scorer)
        with stateless(scorer):
            check_value(scorer, "scorer")
            for model in tiny_models(layers):
                with untouched(model, scorer):
                    _check_on(scorer, model)


@dataclass(frozen=True)
class Answer:
    """One call of a scorer.

    Attributes:
        layer: the layer that had run.
        context: token ids of the row, so far.
        tokens: [v] which tokens were asked for.
        scores: [v] what it said.
    """

    layer: int
    context: tuple[int, ...]
    tokens: tuple[int, ...]
    scores: Tensor


class Witness(ComposedScorer):
    """Hands a scorer all that it is asked, and judges what it answers.

    Attributes:
        scorer: the one that is checked.
    """

    scorer: Scorer
    _answers: list[Answer] = PrivateAttr(default_factory=list)

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """`scorer`."""
        return (self.scorer,)

    def take_answers(self) -> list[Answer]:
        """What it said since this was asked last."""
        taken = list(self._answers)
        self._answers.clear()
        return taken

    def score(self, context: ScoreContext) -> Tensor:
        """The scorer's scores [v], asked for twice."""
        where = f"after layer {context.layer}, with {context.tokens.numel()} of {context.context_tokens} tokens visible"
        shown = {name: tensor.clone() for name, tensor in _tensors(context)}
        scores = self.scorer.score(context)
        self._check_scores(scores, context, where)
        self._check_unchanged(shown, dict(_tensors(context)), where)
        first = scores.detach().clone()
        found = difference([first], [self.scorer.score(context)])
        require(found is None, "deterministic", self.scorer, f"{where}, asked again, its scores differ, {found}")
        ids = context.token_ids
        known = () if ids is None else tuple(ids.tolist())
        self._answers.append(Answer(context.layer, known, tuple(context.tokens.tolist()), first.cpu()))
        return scores

    def _check_scores(self, scores: object, context: ScoreContext, where: str) -> None:
        scorer, wanted = self.scorer, tuple(context.tokens.shape)
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
        require(shape == wanted, "shape", scorer, f"{where}, wanted {wanted}, got {shape}")
        assert isinstance(scores, Tensor)
        require(scores.is_floating_point(), "dtype", scorer, f"{where}, got {scores.dtype}")
        wrong = torch.nonzero(~scores.isfinite()).flatten().tolist()
        found = {index: float(scores[index]) for index in wrong[:4]}
        require(not wrong, "finite", scorer, f"{where}, {len(wrong)} are not finite, by index {found}")

    def _check_unchanged(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], where: str) -> None:
        for name, tensor in before.items():
            same = torch.equal(tensor, after[name])
            require(same, "pure", self.scorer, f"{where}, context.{name} was {_few(tensor)} and is {_few(after[name])}")

    def features(self, states: Tensor, update: Tensor | None) -> Tensor:
        """The scorer's features [q, f]."""
        shown = {"states": states.clone(), **({} if update is None else {"update": update.clone()})}
        found = self.scorer.features(states, update)
        wanted = (states.shape[0], self.scorer.remembered_values(states.shape[1]))
        shape = tuple(found.shape)
        require(shape == wanted, "remembered", self.scorer, f"wanted features of shape {wanted}, got {shape}")
        require(bool(found.isfinite().all()), "remembered", self.scorer, f"features are {_few(found)}")
        for name, tensor in {"states": states, "update": update}.items():
            if tensor is not None:
                require(torch.equal(shown[name], tensor), "pure", self.scorer, f"`features` changes its {name}")
        return found

    def observe(self, attention: AttentionInputs) -> Tensor:
        """What the scorer observes [k]."""
        shown = {name: tensor.clone() for name, tensor in _tensors_of("attention", attention)}
        found = self.scorer.observe(attention)
        wanted, shape = tuple(attention.key_tokens.shape), tuple(found.shape)
        require(shape == wanted, "observed", self.scorer, f"wanted sums of shape {wanted}, got {shape}")
        require(bool(found.isfinite().all()), "observed", self.scorer, f"it gives {_few(found)}")
        self._check_unchanged(shown, dict(_tensors_of("attention", attention)), "in `observe`")
        return found


def _few(tensor: Tensor) -> str:
    flat = tensor.flatten()
    return f"{flat[:4].tolist()}{'...' if flat.numel() > 4 else ''}"


def _tensors(context: ScoreContext) -> Iterator[tuple[str, Tensor]]:
    """Everything a context shows, by name."""
    for field in fields(context):
        value = getattr(context, field.name)
        if field.name == "memory" and value is not None:
            yield "states_of(tokens)", context.states_of(context.tokens)
        elif isinstance(value, tuple):
            for number, part in enumerate(value):
                yield from _tensors_of(f"{field.name}[{number}]", part)
        else:
            yield from _tensors_of(field.name, value)


def _tensors_of(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, AttentionInputs):
        for part in fields(value):
            yield from _tensors_of(f"{name}.{part.name.removeprefix('own_')}", getattr(value, part.name))


def _check_on(scorer: Scorer, model: PreTrainedModel) -> None:
    witness = Witness(scorer=scorer)
    with running(scorer, "made into a pipeline"):
        pipe = LazyPipeline(model, scorer=witness, schedule=Stages(stages=STAGES), cache=AuxCache(), protect=PROTECT)
    answers, _, again = (_answers_in_batch(scorer, pipe, witness, seed) for seed in (0, 1, 0))
    _compare(scorer, "stateless", "the same batch, after another one", answers, again)
    _check_rows(scorer, pipe, witness, answers)
    first = Stages(stages=STAGES if scorer.needs_attention else FROM_EMBEDDINGS)
    static = LazyPipeline(model, scorer=witness, schedule=first, cache=DropCache(), protect=PROTECT)
    _answers_in_batch(scorer, static, witness, 0)
    _check_edges(scorer, static)


def _answers_in_batch(scorer: Scorer, pipe: LazyPipeline, witness: Witness, seed: int) -> list[Answer]:
    with running(scorer, "in a batch of two"):
        batch = Run(pipe, rows=2).play(batch_ids(seed))
    check_steps(batch, scorer)
    return witness.take_answers()


def _check_rows(scorer: Scorer, pipe: LazyPipeline, witness: Witness, answers: Sequence[Answer]) -> None:
    """The rule "rows"."""
    for row, own in enumerate(batch_ids()):
        with running(scorer, f"row {row} alone"):
            Run(pipe, rows=1).play([own])
        what = f"row {row}, in a batch and alone"
        _compare(scorer, "rows", what, _of_row(answers, own), witness.take_answers())


def _of_row(answers: Sequence[Answer], ids: Sequence[Tensor]) -> list[Answer]:
    """The answers about one row, which its token ids tell from others."""
    known = tuple(torch.cat(list(ids)).tolist())
    return [answer for answer in answers if answer.context == known[: len(answer.context)]]


def _compare(scorer: Scorer, rule: str, what: str, one: Sequence[Answer], other: Sequence[Answer]) -> None:
    asked, again = ([(answer.layer, answer.context, answer.tokens) for answer in answers] for answers in (one, other))
    for left, right in zip(one, other, strict=False):
        where = f"{what}: after layer {left.layer} of {len(left.context)} tokens"
        same = (left.layer, left.context, left.tokens) == (right.layer, right.context, right.tokens)
        require(same, rule, scorer, f"{where}, the tokens {_few(torch.tensor(right.tokens))} are visible instead")
        found = difference([left.scores], [right.scores])
        shown = f"{_few(left.scores)} and {_few(right.scores)}"
        require(found is None, rule, scorer, f"{where}, scores are {shown}, they differ {found}")
    require(len(asked) == len(again), rule, scorer, f"{what}: it is asked {len(asked)} and {len(again)} times")


def _check_edges(scorer: Scorer, pipe: LazyPipeline) -> None:
    """Very short prompts, one token over and over, embeddings instead of ids, a step that fails, and generate."""
    bare = LazyPipeline(pipe.model, **{**dict(pipe.config), "protect": Protect()})  # so that few tokens are asked for
    for length in SHORT:
        with running(scorer, f"on a prompt of {length} tokens", may_refuse=True):
            Run(bare, rows=1, marks=UNITS).play([[torch.arange(3, 3 + length), torch.tensor([5])]])
    with running(scorer, "on one token over and over", may_refuse=True):
        Run(bare, rows=1, marks=UNITS).play([[torch.full((24,), 7), torch.tensor([7])]])
    embeddings: Any = pipe.model.get_input_embeddings()
    reading = running(scorer, "on embeddings instead of token ids", may_refuse=True)
    with reading, torch.no_grad(), pipe.attached(missing="nan") as model:
        model(inputs_embeds=embeddings(batch_ids()[0][0][None]), **{CACHE: pipe.new_cache()})
    with running(scorer, "in a step that is interrupted"), suppress(Interruption):
        Run(pipe, rows=1).step([batch_ids(1)[0][0]], callbacks=[Interrupting()])
    with running(scorer, "in generate", may_refuse=True):
        pipe.generate(batch_ids(2)[0][0], max_new_tokens=3, do_sample=False, eos_token_id=VOCABULARY)
