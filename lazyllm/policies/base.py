"""What every policy is: a frozen, validated value that can be written down and read back."""

from __future__ import annotations

import ast
import importlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from lazyllm.errors import ConfigError, unknown
from lazyllm.models.attention import AttentionInputs
from lazyllm.policies.query import AUTO_TOKENS, Query, Unit
from lazyllm.policies.reading import Reads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lazyllm.caches.memory import StateMemory

LayerIndex = int | float
"""A layer as a number (`9`) or as a fraction of the depth (`0.3`)."""

V = TypeVar("V")


class Value(BaseModel):
    """Frozen and validated. Fields may be given by name or, in order, by position.

    Raises:
        ConfigError: for an unknown field or a value out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = list(type(self).model_fields)
        if len(args) > len(fields):
            raise ConfigError(f"{type(self).__name__} takes at most {len(fields)} values, got {len(args)}")
        positional = dict(zip(fields, args, strict=False))
        if twice := sorted(positional.keys() & kwargs.keys()):
            raise ConfigError(f"{type(self).__name__} got {twice[0]!r} twice, by position and by name")
        try:
            super().__init__(**positional, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, type(self))) from None

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in type(self).model_fields)
        return f"{type(self).__name__}({fields})"


class Policy(Value):
    """A frozen choice along one axis."""

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses a model it cannot serve; asks the policies it is made of. Called when a pipeline takes the model.

        Raises:
            ConfigError: with the reason.
        """
        for part in policies_in([getattr(self, name) for name in type(self).model_fields]):
            part.check_model(model, tokenizer)

    @property
    def outside(self) -> tuple[Value, ...]:
        """What it depends on besides its fields, such as the content of a file; nothing unless overridden."""
        return ()

    @classmethod
    def summary(cls) -> str:
        """First line of the policy's docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]


def policies_in(value: Any) -> Iterator[Policy]:
    """The policies among the values of fields, in lists, tuples and mappings too."""
    if isinstance(value, Policy):
        yield value
    elif isinstance(value, Mapping):
        yield from policies_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from policies_in(part)


def explain(error: ValidationError, owner: type[BaseModel]) -> str:
    """One readable line per fault: where, what is wrong, the value, the allowed names."""
    lines = []
    for fault in error.errors(include_url=False):
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{owner.__name__}: " + unknown("field", where, owner.model_fields))
        else:
            message = fault["msg"].removeprefix("Value error, ")
            shown = (
                ""
                if isinstance(fault["input"], Mapping) and fault["type"] == "missing"
                else f"{' Got' if message.endswith('.') else ', got'} {fault['input']!r}"
            )
            lines.append(f"{owner.__name__}.{where}: {message}{shown}")
    return "\n".join(lines)


@dataclass(frozen=True)
class ScoreContext:
    """What a scorer may look at after a layer, for one row of the batch.

    Attributes:
        layer: the layer that has just run, -1 before the first.
        tokens: [v] indices of the visible tokens, ascending; scores are asked for these.
        positions: [v] their positions.
        context_tokens: number of tokens the row has seen so far, pruned ones included.
        query: [w] indices of the query tokens, ascending; the last tokens in a decode step.
        computed: [q] indices of the tokens the layer has computed in this step.
        states: [q, c] their hidden states after the layer (the embeddings when layer is -1).
        attention: queries, keys and values the layer used; None before layer 0, or when nobody reads them.
        earlier: those of the layers before it, the latest last, for scorers with `reads_layers` above 1.
        read_next: gives those that the next layer would use; None after the last one.
        memory: features after this layer of every token that has passed it, kept for scorers that set `needs_memory`.
        tally: [t] sum of what `observe` gave each token so far, for scorers that set `accumulates`; None = nothing.
        token_ids: [t] vocabulary ids of all tokens of the row; None when the model was given embeddings.
        starts: by kind of unit, the first token of each line, sentence or paragraph; empty where the text is not known.
        reads: language models that read the prompt for scorers that name them in `reads_models`.
    """

    layer: int
    tokens: Tensor
    positions: Tensor
    context_tokens: int
    query: Tensor
    computed: Tensor
    states: Tensor
    attention: AttentionInputs | None
    memory: StateMemory | None = None
    token_ids: Tensor | None = None
    starts: Mapping[Unit, Sequence[int]] = field(default_factory=dict)
    earlier: tuple[AttentionInputs, ...] = ()
    read_next: Callable[[], AttentionInputs] | None = None
    tally: Tensor | None = None
    reads: Reads = field(default_factory=dict)

    def states_of(self, tokens: Tensor) -> Tensor:
        """Features [v, f] after this layer of any tokens [v] that have passed it, in this step or before.

        They are the hidden states [v, c], unless a scorer keeps others.
        """
        assert self.memory is not None, "a scorer that looks back at states sets needs_memory"
        return self.memory.gather(tokens)

    def tallied(self) -> Tensor:
        """Sums [v] of the visible tokens, 0 for those that were never observed."""
        assert self.tally is not None, "a scorer that reads sums sets accumulates"
        return torch.nn.functional.pad(self.tally, (0, self.context_tokens - self.tally.numel()))[self.tokens]

    def attention_to_visible(self, queries: int) -> Tensor:
        """Attention probabilities [h, q, v] of the last `queries` new tokens over the visible ones."""
        return self.over_visible(self.layer_attention, queries)

    @property
    def layer_attention(self) -> AttentionInputs:
        """What the attention of the layer used."""
        assert self.attention is not None, "a scorer that reads attention runs after a layer, and sets needs_attention"
        return self.attention

    def over_visible(self, attention: AttentionInputs, queries: int) -> Tensor:
        """Attention probabilities [h, q, v] of the last `queries` new tokens of this layer or another."""
        return attention.probabilities(queries)[..., attention.columns(self.tokens)]


class Scorer(Policy):
    """Gives every visible token a score; the highest are kept.

    A scorer is pure: the same context gives the same scores. Its flags say what it reads, so that nothing else is kept
    for it:

    - `needs_attention` for `context.attention`; it cannot prune before the first layer;
    - `reads_layers` above 1 for `context.earlier`;
    - `needs_next` for `context.read_next`; the next layer makes queries and keys of all visible tokens once more;
    - `needs_memory` for `context.states_of`, which gives what `features` kept of each token;
    - `needs_update` for the `update` that `features` gets;
    - `accumulates` for `context.tally`, to which every step adds what `observe` gives.
    """

    needs_attention: ClassVar[bool] = False
    needs_next: ClassVar[bool] = False
    needs_memory: ClassVar[bool] = False
    needs_update: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False

    @property
    def reads_layers(self) -> int:
        """Of how many of the latest layers it reads attention."""
        return 1

    @property
    def reads_models(self) -> tuple[str | None, ...]:
        """Language models that read the prompt for it, by path or hub id; None is the model that is run."""
        return ()

    @property
    def reads_query(self) -> Query | None:
        """The query it looks back from, None when it has none; these tokens are protected."""
        return None

    @property
    def compares(self) -> int:
        """With how many query tokens each visible token is compared, for predicting what a score costs; 0 = none."""
        return AUTO_TOKENS if self.needs_memory else int(self.needs_attention)

    def remembered_values(self, hidden: int) -> int:
        """How many numbers it remembers of a token whose state has `hidden`, for predicting what a cache holds."""
        return hidden if self.needs_memory else 0

    def features(self, states: Tensor, update: Tensor | None) -> Tensor:
        """What to remember [q, f] of tokens a layer has just computed.

        Args:
            states: [q, c] their hidden states.
            update: [q, c] what the layer's attention added to them; None unless `needs_update` is set.
        """
        return states

    def observe(self, attention: AttentionInputs) -> Tensor:
        """What one step adds to the sums [k] of the tokens that were attended."""
        raise NotImplementedError(f"{type(self).__name__} accumulates, but gives no observe")

    @abstractmethod
    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v], float, higher = keep; finite."""
        raise NotImplementedError


@dataclass(frozen=True)
class Phase:
    """What a schedule may look at.

    Attributes:
        is_prefill: whether tokens of a prompt are new, or of a reply.
        context_tokens: how long the context is.
        asked: whether the prompt asks something.
    """

    is_prefill: bool
    context_tokens: int
    asked: bool = False


@dataclass(frozen=True)
class Keep:
    """How many tokens may enter a layer: a fixed fraction of the context. Subclasses may count, or read the scores.

    Attributes:
        ratio: at most this fraction of all tokens the row has seen.
        adapts: whether fewer tokens than the ratio allows may be kept, so that scores are always asked for.
    """

    ratio: float
    adapts: ClassVar[bool] = False

    def limit(self, context_tokens: int) -> int:
        """The most tokens that may enter: the ratio of the whole context, rounded down, at least one."""
        return tokens_of(self.ratio, context_tokens)

    def fraction(self, context_tokens: int) -> float:
        """The most that may enter as a fraction of the context."""
        return self.ratio

    def free_tokens(self, scores: Tensor, protected: int, context_tokens: int) -> int:
        """How many tokens enter beside the protected ones, given the scores [f] of all that might."""
        return min(scores.numel(), max(0, self.limit(context_tokens) - protected))

    def __str__(self) -> str:
        return f"{self.ratio:.4g}"


def tokens_of(ratio: float, context_tokens: int) -> int:
    """The number of tokens that a fraction of the context means: rounded down, at least one."""
    return max(1, int(ratio * context_tokens + 1e-9))


class Schedule(Policy):
    """Says how many tokens may enter each layer. A subclass gives `keep_ratios`, or `cuts` if it adapts."""

    def keep_ratios(self, layers: int) -> list[float]:
        """Keep ratios in (0, 1], one per layer, non-increasing."""
        raise NotImplementedError(f"{type(self).__name__} gives neither keep_ratios nor cuts")

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """By layer, how many tokens may enter it, for the layers where tokens are pruned."""
        ratios = self.resolve(layers)
        before = [1.0, *ratios]
        return {layer: Keep(ratio) for layer, ratio in enumerate(ratios) if ratio < before[layer]}

    def resolve(self, layers: int) -> list[float]:
        """`keep_ratios`, checked.

        Raises:
            ConfigError: for a wrong count, a ratio outside (0, 1], or ratios that increase.
        """
        ratios = self.keep_ratios(layers)
        if len(ratios) != layers:
            raise ConfigError(f"{self} gives {len(ratios)} keep ratios for {layers} layers")
        for layer, ratio in enumerate(ratios):
            if not 0 < ratio <= 1:
                raise ConfigError(f"{self}: keep ratio {ratio} at layer {layer}; it must be in (0, 1]")
            if layer and ratio > ratios[layer - 1]:
                raise ConfigError(
                    f"{self}: keep ratio rises from {ratios[layer - 1]} to {ratio} at layer {layer}; "
                    "a pruned token cannot come back within a step, so ratios must not increase over layers"
                )
        return ratios


def layer_number(layer: LayerIndex, layers: int, *, owner: object) -> int:
    """The layer number that an index or a fraction of the depth means.

    A fraction is rounded down, but never to layer 0: some part of the depth lies before it.

    Raises:
        ConfigError: for a layer beyond the last one.
    """
    number = max(1, int(layer * layers + 1e-9)) if isinstance(layer, float) else layer
    if not 0 <= number < layers:
        raise ConfigError(f"{owner}: layer {layer} does not exist; the model has layers 0 to {layers - 1}")
    return number


def layer_numbers(by_layer: Mapping[LayerIndex, V], layers: int, *, owner: object) -> dict[int, V]:
    """What stands at indices or fractions of the depth, by the layer numbers they mean.

    Raises:
        ConfigError: for a layer beyond the last one, or one that is meant twice.
    """
    numbered: dict[int, V] = {}
    for layer, value in by_layer.items():
        number = layer_number(layer, layers, owner=owner)
        if number in numbered:
            raise ConfigError(f"{owner}: two stages fall on layer {number} of {layers}")
        numbered[number] = value
    return numbered


def number_keys(by_layer: Any) -> Any:
    """JSON writes keys as text; reads them back as the layer or fraction they were (a pydantic validator's body)."""
    if not isinstance(by_layer, dict):
        return by_layer
    return {_number(key) if isinstance(key, str) else key: value for key, value in by_layer.items()}


def _number(text: str) -> int | float | str:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text  # pydantic says what is wrong with it


def check_layer_index(layer: LayerIndex) -> LayerIndex:
    """Refuses fractions that name no depth and negative layers (a pydantic validator's body)."""
    if isinstance(layer, float) and not 0 < layer < 1:
        raise ValueError(
            f"a layer given as a float is a fraction of the depth, in (0, 1), not {layer}; "
            "give a whole number to name a layer"
        )
    if layer < 0:
        raise ValueError(f"a layer is counted from 0, not {layer}")
    return layer


P = TypeVar("P", bound=Policy)


class Registry(Mapping[str, type[P]], Generic[P]):
    """Named policies of one axis. Classes it has never heard of work by import path.

    `build` accepts what a person would write: an instance, `"Name"`, `"Name(field=value)"`,
    `"package.module:Class(...)"`, or a mapping `{"name": ..., field: value}`.
    """

    def __init__(self, kind: str, base: Any, classes: Sequence[type[P]]) -> None:
        self.kind = kind
        self.base: type[P] = base
        self._classes = {cls.__name__: cls for cls in classes}

    def __getitem__(self, name: str) -> type[P]:
        try:
            return self._classes[name]
        except KeyError:
            raise ConfigError(unknown(self.kind, name, self._classes)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def find(self, name: str) -> type[P]:
        """The class with a registered name or an import path `package.module:Class`."""
        if ":" not in name:
            return self[name]
        module_name, _, class_name = name.partition(":")
        try:
            found = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{self.kind} {name!r} cannot be imported: {error}") from None
        if not (isinstance(found, type) and issubclass(found, self.base)):
            raise ConfigError(f"{self.kind} {name!r} is not a {self.base.__name__} class")
        return found

    def build(self, spec: P | str | Mapping[str, Any]) -> P:
        """The policy that `spec` describes.

        Raises:
            ConfigError: when it describes none.
        """
        if isinstance(spec, self.base):
            return spec
        if isinstance(spec, type) and issubclass(spec, self.base):
            raise ConfigError(f"{self.kind} is the class {spec.__name__}; give an instance, {spec.__name__}(...)")
        if isinstance(spec, str):
            name, args, fields = parse_call(spec)
            return self.find(name)(*args, **fields)
        if isinstance(spec, Mapping):
            fields = dict(spec)
            if not isinstance(name := fields.pop("name", None), str):
                raise ConfigError(f"{self.kind} needs a 'name', got {dict(spec)!r}. Known: {', '.join(self)}.")
            return self.find(name)(**fields)
        raise ConfigError(
            f"{self.kind} must be a {self.base.__name__}, a name or a mapping with a 'name', got {spec!r}"
        )

    def describe(self, policy: P) -> dict[str, Any]:
        """The mapping that `build` turns back into `policy`."""
        cls = type(policy)
        known = self._classes.get(cls.__name__) is cls
        name = cls.__name__ if known else f"{cls.__module__}:{cls.__qualname__}"
        return {"name": name, **json.loads(policy.model_dump_json())}


def parse_call(text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Splits `Name(1, field=2)` into name, positional and named literal values; runs no code.

    Raises:
        ConfigError: when the text is neither a name nor such a call.
    """
    name, bracket, _ = text.strip().partition("(")
    if not bracket:
        return name, [], {}
    try:
        call = ast.parse("f" + text.strip()[len(name) :], mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise ValueError("not a call of a name")
        if any(word.arg is None for word in call.keywords):
            raise ValueError("fields from a **mapping have no names to read")
        named = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
        return name, [ast.literal_eval(value) for value in call.args], named
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise ConfigError(
            f"cannot read {text!r}; write Name, or Name(field=value, ...) with plain numbers, strings, lists or dicts"
        ) from None


def stable_top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores; of equal ones the later token stays."""
    order = torch.argsort(scores.flip(0), stable=True, descending=True)[:count]
    return scores.numel() - 1 - order
