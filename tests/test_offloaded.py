"""Frontier states in CPU memory or in a file: the same results, other places, and errors before work starts."""

import gc
import os
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import AuxCache, CacheError, ConfigError, LazyPipeline, OffloadedAux, Stages
from tests.histories import History, Moving, new_history, policies, scripts
from tests.replay import assert_replays
from tests.test_saved import files_of_at_most
from tests.tiny import random_ids, tiny_model

REVIVING = {"scorer": Moving(), "schedule": Stages({1: 0.6, 3: 0.3})}


@given(st.data())
def test_where_states_wait_changes_no_bit(data):
    chosen, script = data.draw(policies()), data.draw(scripts(2))
    decode, most = data.draw(st.sampled_from(["select", "reuse"])), data.draw(st.sampled_from([None, 2]))
    fields = {"decode": decode, "max_revived": most}
    here, *there = (
        new_history(tiny_model(), cache=cache, **chosen)
        for cache in (AuxCache(**fields), OffloadedAux(**fields), OffloadedAux(where="disk", **fields))
    )
    for ids, real in script:
        expected = here.step(ids, real)
        for history in there:
            assert torch.equal(history.step(ids, real).nan_to_num(7), expected.nan_to_num(7))
    for history in there:
        assert history.cache.aux_bytes == here.cache.aux_bytes
        frontiers = sum(row.frontier.used_bytes for row in history.cache.rows)
        assert history.cache.offloaded_bytes == frontiers
    assert here.cache.offloaded_bytes == 0


def files_in(folder) -> int:
    """Files of a folder that this process holds open, those without a name included."""
    handles = (f"/proc/self/fd/{handle}" for handle in os.listdir("/proc/self/fd"))
    return sum(os.readlink(handle).startswith(f"{folder}/") for handle in handles if os.path.islink(handle))


def on_disk(folder, rows: int = 2) -> History:
    """A history whose states wait in a file, after a prefill and a step that revives."""
    history = new_history(tiny_model(), cache=OffloadedAux(where="disk", folder=str(folder)), **REVIVING)
    for seed, length in enumerate((24, 7, 1)):
        history.step(random_ids(rows, length, seed))
    assert any(event.rows[0].revived.numel() for step in history.steps for event in step)
    return history


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="asks the system which files are open")
def test_a_file_has_no_name_and_is_gone_with_its_store(tmp_path):
    history = on_disk(tmp_path)
    assert files_in(tmp_path) == 2
    assert not list(tmp_path.iterdir())
    fork = history.fork()
    assert files_in(tmp_path) == 2, "what is shared is in the file of both"
    fork.step(random_ids(2, 9, 5))
    assert files_in(tmp_path) == 4
    history.cache.reset()
    gc.collect()
    assert files_in(tmp_path) == 2
    assert_replays(fork)
    del history, fork
    gc.collect()
    assert files_in(tmp_path) == 0


def test_a_file_takes_its_room_on_systems_without_fallocate_too(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert_replays(on_disk(tmp_path))


@pytest.mark.parametrize(("place", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(place: str, reason: str, tmp_path):
    (tmp_path / "file").touch()
    cache = OffloadedAux(where="disk", folder=str(tmp_path / place))
    LazyPipeline(cache=cache)  # a recipe may be for another machine
    with pytest.raises(ConfigError, match=reason) as error:
        LazyPipeline(tiny_model(), cache=cache)
    assert str(tmp_path / place) in str(error.value)


def test_a_folder_without_a_disk_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a folder is for where='disk', not for where='cpu'"):
        OffloadedAux(folder=str(tmp_path))


def test_the_systems_folder_is_taken_when_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="the system's folder for temporary files: No such file"):
        LazyPipeline(tiny_model(), cache=OffloadedAux(where="disk"))


def test_a_disk_that_is_full_undoes_the_step(tmp_path):
    """Also when it is full only for a later row, after other rows have found room."""
    history = on_disk(tmp_path, rows=3)
    cache, before = history.cache, history.fork()
    held = [(row.ledger.depth.clone(), row.frontier.tokens) for row in cache.rows]
    rooms, room = [], type(cache.rows[0].frontier).room

    def second_finds_none(store, slots, like):
        rooms.append(store)
        if len(rooms) < 2:
            return room(store, slots, like)
        with files_of_at_most(64):
            return room(store, slots, like)

    ids = random_ids(3, 12, 9)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), history.pipe.attached(missing="nan") as model:
        patch.setattr(type(cache.rows[0].frontier), "room", second_finds_none)
        with pytest.raises(CacheError, match=r"no room for \d+ bytes of states in .*File too large"):
            model(ids, past_key_values=cache)
    assert len(rooms) == 2
    for row, (depth, tokens) in zip(cache.rows, held, strict=True):
        assert torch.equal(row.ledger.depth, depth)
        assert torch.equal(row.frontier.tokens, tokens)
    assert torch.equal(history.step(ids).nan_to_num(7), before.step(ids).nan_to_num(7))
    assert_replays(history)
