"""Stores of states of unfinished tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import AuxCache, OffloadedAux
from lazyllm.caches.frontier import FrontierStore

WIDTH = 3
TOKENS = st.lists(st.integers(0, 40), unique=True, min_size=1, max_size=30)


@given(st.data(), st.sampled_from([AuxCache(), OffloadedAux(), OffloadedAux(where="disk")]))
def test_a_store_holds_what_a_dictionary_would(data, policy):
    """Through writes, freed entries, crops, trims and copies that go their own ways."""
    stores: list[tuple[FrontierStore, dict[int, float]]] = [(policy.new_frontier(), {})]
    for step in range(data.draw(st.integers(1, 8))):
        store, expected = stores[data.draw(st.integers(0, len(stores) - 1))]
        tokens = data.draw(TOKENS)
        action = data.draw(st.sampled_from(["put", "put", "free", "crop", "trim", "copy"]))
        if action == "put":
            store.put(torch.tensor(tokens, dtype=torch.long), torch.full((len(tokens), WIDTH), float(step)))
            expected.update(dict.fromkeys(tokens, float(step)))
        elif action == "free":
            store.free(torch.tensor(tokens, dtype=torch.long))
            for token in tokens:
                expected.pop(token, None)
        elif action == "crop":
            left = data.draw(st.integers(0, 40))
            store.crop(left)
            for token in [token for token in expected if token >= left]:
                del expected[token]
        elif action == "trim":
            store.trim()
        else:
            stores.append((store.copy(), dict(expected)))
        for held, wanted in stores:
            assert held.tokens.tolist() == sorted(wanted)
            assert held.used_bytes == 4 * WIDTH * len(wanted)
            if wanted:
                assert held.read(held.tokens)[:, 0].tolist() == [wanted[token] for token in sorted(wanted)]


@pytest.mark.parametrize(("policy", "rows"), [(AuxCache(), 2), (OffloadedAux(), 2), (OffloadedAux(where="disk"), 30)])
def test_what_was_freed_is_given_back_but_for_a_file(policy, rows):
    store = policy.new_frontier()
    store.put(torch.arange(30), torch.ones(30, WIDTH))
    store.free(torch.arange(28))
    store.trim()
    assert store._packed.shape[0] == rows
    assert store.tokens.tolist() == [28, 29]
