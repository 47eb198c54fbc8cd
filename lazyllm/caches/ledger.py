"""The depth of every token: the one piece of bookkeeping the laws are about."""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from lazyllm.caches.indexing import GrowingBuffer

AXES = 3
"""Of a RoPE that gives the tokens of an image a time, a row and a column."""


class Ledger:
    """Depth, position and column of every token of one row, on the host.

    A token is named by its index: the order in which the row saw it. `depth` is the number of layers
    that have computed it, so K/V exist for it exactly at layers 0 .. depth-1.

    Attributes:
        layers: number of layers of the model.
        at_depth: how many tokens have each depth, [layers + 1].
        knows_ids: whether the vocabulary ids of all tokens are known.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.at_depth = [0] * (layers + 1)
        self.knows_ids = True
        self._running: tuple[Tensor, int] | None = None
        self._depth, self._position, self._column, self._token_id = (GrowingBuffer(0) for _ in range(4))
        self._place: GrowingBuffer | None = None
        self._reach: GrowingBuffer | None = None
        empty = torch.empty(0, dtype=torch.long)
        for buffer in self._buffers:
            buffer.append(empty)

    @property
    def _buffers(self) -> tuple[GrowingBuffer, ...]:
        always = self._depth, self._position, self._column, self._token_id
        return always + tuple(buffer for buffer in (self._place, self._reach) if buffer is not None)

    def __len__(self) -> int:
        return self._depth.length

    @property
    def depth(self) -> Tensor:
        """[t] number of layers that have computed each token."""
        self._settle()
        return self._depth.read()

    @property
    def position(self) -> Tensor:
        """[t] position of each token, as RoPE and causality see it; rises with the index."""
        return self._position.read()

    @property
    def place(self) -> Tensor | None:
        """[t, 3] where a RoPE with three axes sees each token; None where that is its position along every axis."""
        return None if self._place is None else self._place.read()

    @property
    def reach(self) -> Tensor | None:
        """[t] the last position each token sees, such as that of the end of its image; None where that is its own."""
        return None if self._reach is None else self._reach.read()

    @property
    def column(self) -> Tensor:
        """[t] column of each token in the padded batch."""
        return self._column.read()

    @property
    def token_id(self) -> Tensor:
        """[t] vocabulary id of each token, -1 where the model was given an embedding."""
        return self._token_id.read()

    @property
    def ahead(self) -> int:
        """By how much the last places lie beyond the last position."""
        return 0 if self.place is None else int(self.place.max() - self.position[-1])

    def append(
        self,
        position: Tensor,
        column: Tensor,
        token_id: Tensor | None = None,
        *,
        place: Tensor | None = None,
        reach: Tensor | None = None,
    ) -> Tensor:
        """Adds tokens of depth 0 and returns their indices [t]."""
        self._settle()
        start, added = len(self), position.numel()
        if place is not None or self._place is not None:
            self._place = _grown(self._place, _along_axes(self.position), _along_axes(position), place)
        if reach is not None or self._reach is not None:
            self._reach = _grown(self._reach, self.position, position, reach)
        self._depth.append(torch.zeros(added, dtype=torch.long))
        self._position.append(position)
        self._column.append(column)
        self._token_id.append(torch.full_like(position, -1) if token_id is None else token_id)
        self.knows_ids &= token_id is not None
        self.at_depth[0] += added
        return torch.arange(start, start + added)

    def ready(self, tokens: Tensor, layer: int) -> Tensor:
        """Those of `tokens` whose next layer is `layer` (law 2)."""
        return tokens[self.depth[tokens] == layer]

    def advance(self, tokens: Tensor, layer: int) -> None:
        """Notes that `layer` has computed `tokens`, all of which were waiting for it.

        The depth of tokens that go from layer to layer together is written when it is next asked for.
        """
        if self._running is not None and self._running[0] is not tokens:
            self._settle()
        self._running = tokens, layer + 1
        self.at_depth[layer] -= tokens.numel()
        self.at_depth[layer + 1] += tokens.numel()

    def _settle(self) -> None:
        """Writes the depth of the tokens that went through the latest layers together."""
        if self._running is not None:
            (tokens, layers), self._running = self._running, None
            self._depth.writable()[tokens] = layers

    def retreat(self, tokens: Tensor, layer: int) -> None:
        """Sets `tokens`, all of them deeper, back to where they wait for `layer`."""
        self._settle()
        depth = self._depth.writable()
        for reached, count in zip(*(part.tolist() for part in depth[tokens].unique(return_counts=True)), strict=True):
            self.at_depth[reached] -= count
        self.at_depth[layer] += tokens.numel()
        depth[tokens] = layer

    def restore(self, depth: Tensor) -> None:
        """Goes back to an earlier `depth` [t], forgetting the tokens that came later."""
        self._running = None
        for buffer in self._buffers:
            buffer.truncate(depth.numel())
        self._depth.writable().copy_(depth)
        if self._reach is not None and depth.numel():
            self._reach.writable().clamp_(max=int(self.position[-1]))  # of a block that was cut
        self.at_depth = torch.bincount(depth, minlength=self.layers + 1).tolist()
        self.knows_ids = bool((self.token_id >= 0).all())

    def copy(self) -> "Ledger":
        """An independent copy."""
        self._settle()
        twin = Ledger(self.layers)
        for name in ("_depth", "_position", "_column", "_token_id", "_place", "_reach"):
            buffer = getattr(self, name)
            setattr(twin, name, None if buffer is None else buffer.copy())
        twin.at_depth, twin.knows_ids = list(self.at_depth), self.knows_ids
        return twin

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file."""
        state = {"depth": self.depth, "position": self.position, "column": self.column, "token_id": self.token_id}
        optional = {"place": self.place, "reach": self.reach}
        return state | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def load_state(self, state: Mapping[str, Tensor], *, columns: int = 0, moved: int = 0) -> None:
        """Takes up what another ledger's `state` gave, behind its own tokens.

        `columns` and `moved` are added to the columns and to the positions.
        """
        depth = torch.cat([self.depth, state["depth"]])
        optional = {name: state[name] + moved if name in state else None for name in ("place", "reach")}
        self.append(state["position"] + moved, state["column"] + columns, state["token_id"], **optional)
        self.restore(depth)


def _along_axes(position: Tensor) -> Tensor:
    """Places [t, 3] of tokens that stand at positions [t] along every axis."""
    return repeat(position, "t -> t a", a=AXES)


def _grown(buffer: GrowingBuffer | None, before: Tensor, usual: Tensor, given: Tensor | None) -> GrowingBuffer:
    """A buffer with what is `given` of new tokens, else the `usual`; a new one starts with what was `before`."""
    if buffer is None:
        buffer = GrowingBuffer(0)
        buffer.append(before)
    buffer.append(usual if given is None else given)
    return buffer
