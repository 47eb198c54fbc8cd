"""The sizes of a decoder that its costs depend on."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, NamedTuple

import torch
import yaml
from pydantic import Field
from transformers import AutoModelForCausalLM
from transformers.cache_utils import get_layer_types_and_kwargs

from lazyllm.errors import InputError, UnsupportedModelError, unknown
from lazyllm.models.families import ATTENDING_TYPES
from lazyllm.models.flops import FlopModel, active_weights
from lazyllm.policies.base import Value

Count = Annotated[int, Field(ge=1)]


class Matrix(NamedTuple):
    """A weight of one layer: `inputs x outputs`, in `copies`, of which a token visits `visited`."""

    inputs: int
    outputs: int
    copies: int = 1
    visited: int = 1

    @property
    def stored(self) -> int:
        """Entries of all copies."""
        return self.inputs * self.outputs * self.copies

    @property
    def active(self) -> int:
        """Entries a token is multiplied with."""
        return self.inputs * self.outputs * self.visited


class ModelShape(Value):
    """A decoder with rotary positions and a gated MLP of three matrices, or several of them as experts.

    Norms and biases are left out: they are below a thousandth of the weights.

    Attributes:
        layers: number of layers.
        hidden: hidden size.
        intermediate: width of the MLP, of one expert in a mixture.
        heads, kv_heads, head_dim: query heads, key and value heads, and the size of each.
        vocabulary: rows of the embedding and of the LM head.
        experts, active_experts: MLPs per layer, and how many of them a token visits.
        tied: whether embedding and LM head are one matrix.
        windows: sliding window of each layer in tokens, None = full attention; repeated over the depth.
    """

    layers: Count
    hidden: Count
    intermediate: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    vocabulary: Count
    experts: Count = 1
    active_experts: Count = 1
    tied: bool = False
    windows: Annotated[tuple[Count | None, ...], Field(min_length=1)] = (None,)

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """A public model's shape, e.g. `"llama-3.1-70b"`.

        Raises:
            InputError: for a name that is not in `shapes.yaml`.
        """
        shapes = named_shapes()
        if name not in shapes:
            raise InputError(unknown("model shape", name, shapes))
        return shapes[name]

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """The shape in a transformers configuration, checked against the layers that transformers builds from it.

        The layers are built without weights, on the meta device.

        Raises:
            UnsupportedModelError: when a layer is no gated MLP behind attention with keys and values per head.
        """
        text = config.get_text_config(decoder=True)
        types, options = get_layer_types_and_kwargs(text)
        if strange := sorted(set(types) - set(ATTENDING_TYPES)):
            raise UnsupportedModelError(f"{text.model_type} has layers of type {', '.join(strange)}; no cost is known")
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        shape = cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "moe_intermediate_size", None) or text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            experts=experts,
            active_experts=text.num_experts_per_tok if experts > 1 else 1,
            tied=bool(text.tie_word_embeddings),
            windows=tuple(option.get("sliding_window") for option in options),
        )
        shape._check_layers(text)
        return shape

    def _check_layers(self, config: Any) -> None:
        expected = sum(matrix.active for matrix in self.matrices)
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation="eager")
        for index, layer in enumerate(model.get_decoder().layers):
            if (found := active_weights(layer, config)) != expected:
                raise UnsupportedModelError(
                    f"a token meets {found:,} weights in layer {index} of this {config.model_type}, and "
                    f"{expected:,} in grouped-query attention and a gated MLP of its sizes; no cost is known"
                )

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens."""
        return self.windows[layer % len(self.windows)]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The weights of one layer that tensor parallelism splits."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        router = (Matrix(self.hidden, self.experts),) if self.experts > 1 else ()
        experts = self.experts, self.active_experts
        return (
            Matrix(self.hidden, queries),
            Matrix(self.hidden, keys),
            Matrix(self.hidden, keys),
            Matrix(queries, self.hidden),
            *router,
            Matrix(self.hidden, self.intermediate, *experts),
            Matrix(self.hidden, self.intermediate, *experts),
            Matrix(self.intermediate, self.hidden, *experts),
        )

    @property
    def weights(self) -> int:
        """Entries of all weight matrices, embedding and LM head included."""
        return self.layers * sum(matrix.stored for matrix in self.matrices) + self.head_weights * (2 - self.tied)

    @property
    def head_weights(self) -> int:
        """Entries of the LM head."""
        return self.vocabulary * self.hidden

    @property
    def key_values(self) -> int:
        """Numbers a token keeps at one layer: a key and a value per head."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def moved_whole(self) -> int:
        """Numbers read or written per token and layer outside matrices, by what every device of a group does.

        Two norms at 7 passes over the hidden size, two residual additions at 3.
        """
        return 20 * self.hidden

    @property
    def moved_split(self) -> int:
        """The same for what tensor parallelism splits.

        Rotary embedding at 10 passes over queries and keys, the heads' outputs laid side by side at 2, K/V copied to
        the cache at 2, activation and gate of the MLP at 5.
        """
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return 12 * queries + 14 * keys + 5 * self.intermediate * self.active_experts

    @property
    def costs(self) -> FlopModel:
        """Operations per token, per pair and per row of logits."""
        return FlopModel(
            per_token=(2 * sum(matrix.active for matrix in self.matrices),) * self.layers,
            per_pair=(4 * self.heads * self.head_dim,) * self.layers,
            per_logits=2 * self.head_weights,
        )


@cache
def named_shapes() -> dict[str, ModelShape]:
    """Every shape of `shapes.yaml` by name."""
    text = (files("lazyllm.costs") / "shapes.yaml").read_text(encoding="utf-8")
    return {name: ModelShape(**fields) for name, fields in yaml.safe_load(text).items()}
