"""Buffers that grow."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm.caches.indexing import GrowingBuffer


@given(st.data())
def test_a_buffer_holds_what_a_list_would(data):
    """Through appends, changes in place, truncation, selection and copies that go their own ways.

    What it was given is never written to.
    """
    axis, given_entries = data.draw(st.integers(0, 1)), []
    buffers: list[tuple[GrowingBuffer, list[float]]] = [(GrowingBuffer(axis), [])]
    if data.draw(st.booleans()):
        buffers[0][0].reserve(data.draw(st.integers(0, 300)))
    for step in range(data.draw(st.integers(1, 8))):
        buffer, expected = buffers[data.draw(st.integers(0, len(buffers) - 1))]
        entries = torch.full((data.draw(st.integers(0, 90)), 2), float(step))
        entries = entries if axis == 0 else entries.T
        given_entries.append((entries, entries.clone()))
        buffer.append(entries)
        expected += [float(step)] * entries.shape[axis]
        action = data.draw(st.sampled_from(["nothing", "write", "truncate", "keep", "copy", "trim"]))
        if action == "write":
            buffer.writable().fill_(-1 - step)
            expected[:] = [-1.0 - step] * len(expected)
        elif action == "truncate":
            length = data.draw(st.integers(0, len(expected)))
            buffer.truncate(length)
            del expected[length:]
        elif action == "keep":
            slots = data.draw(st.lists(st.integers(0, len(expected) - 1), unique=True)) if expected else []
            buffer.keep(torch.tensor(slots, dtype=torch.long))
            expected[:] = [expected[slot] for slot in slots]
        elif action == "trim":
            buffer.trim()
        elif action == "copy":
            buffers.append((buffer.copy(), list(expected)))
        for held, wanted in buffers:
            assert held.read().select(1 - axis, 0).tolist() == wanted
            assert held.used_bytes == 2 * 4 * len(wanted)
    assert all(torch.equal(entries, before) for entries, before in given_entries)


def test_a_copy_shares_memory_until_one_of_both_writes():
    buffer = GrowingBuffer(0)
    for _ in range(2):
        buffer.append(torch.ones(50, 2))
    twin = buffer.copy()
    assert twin.read().data_ptr() == buffer.read().data_ptr()
    twin.append(torch.zeros(1, 2))
    assert twin.read().data_ptr() != buffer.read().data_ptr()
    other = buffer.copy()
    buffer.writable()[0] = 7
    assert other.read()[0].tolist() == [1, 1]
    place = buffer.read().data_ptr()
    buffer.writable()[0] = 8
    assert buffer.read().data_ptr() == place, "what is its own is not copied again"


def test_room_to_grow_is_given_back_once_and_what_is_shared_is_left():
    buffer = GrowingBuffer(0)
    for _ in range(2):
        buffer.append(torch.ones(50, 2))
    assert held_bytes(buffer) > buffer.used_bytes
    buffer.trim()
    assert held_bytes(buffer) == buffer.used_bytes
    place = buffer.read().data_ptr()
    buffer.trim()
    assert buffer.read().data_ptr() == place, "there was nothing to give back"
    buffer.append(torch.ones(1, 2))
    twin = buffer.copy()
    for one in (buffer, twin):
        one.trim()
    assert twin.read().data_ptr() == buffer.read().data_ptr()


def held_bytes(buffer: GrowingBuffer) -> int:
    return buffer.read().untyped_storage().nbytes()
