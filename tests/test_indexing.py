"""Buffers that grow."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm.indexing import GrowingBuffer


@given(st.data())
def test_a_buffer_holds_what_a_list_would(data):
    """Through appends, truncation, selection and copies; what it was given is never written to."""
    axis, expected, given_entries = data.draw(st.integers(0, 1)), [], []
    buffer = GrowingBuffer(axis)
    if data.draw(st.booleans()):
        buffer.reserve(data.draw(st.integers(0, 300)))
    for step in range(data.draw(st.integers(1, 6))):
        entries = torch.full((data.draw(st.integers(0, 90)), 2), float(step))
        entries = entries if axis == 0 else entries.T
        given_entries.append((entries, entries.clone()))
        buffer.append(entries)
        expected += [float(step)] * entries.shape[axis]
        action = data.draw(st.sampled_from(["nothing", "truncate", "keep", "copy"]))
        if action == "truncate":
            length = data.draw(st.integers(0, len(expected)))
            buffer.truncate(length)
            expected = expected[:length]
        elif action == "keep":
            slots = data.draw(st.lists(st.integers(0, len(expected) - 1), unique=True)) if expected else []
            buffer.keep(torch.tensor(slots, dtype=torch.long))
            expected = [expected[slot] for slot in slots]
        elif action == "copy":
            buffer, original = buffer.copy(), buffer
            original.append(entries)
        assert buffer.read().select(1 - axis, 0).tolist() == expected
        assert buffer.used_bytes == 2 * 4 * len(expected)
    assert all(torch.equal(entries, before) for entries, before in given_entries)
