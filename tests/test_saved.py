"""Caches in files: what is loaded goes on as the saved one would have, bit for bit; what is not whole is refused."""

import errno
import json
import os
import resource
import warnings
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lazyllm import (
    AccumulatedAttention,
    AuxCache,
    BudgetCache,
    CacheError,
    ConfigError,
    DropCache,
    EvictingCache,
    LazyCache,
    LazyPipeline,
    OffloadedAux,
    PromptMarks,
    QuantizedAux,
    QuantizedKV,
    Stages,
)
from lazyllm.caches.saved import DIGEST, DOCUMENT, VERSION
from tests.histories import CACHES, FORGETTING_CACHES, ROUNDING_CACHES, History, Moving, new_history, policies, scripts
from tests.replay import assert_replays
from tests.tiny import FAMILY_KERNELS, random_ids, tiny_model, word_tokenizer

REVIVING = {"scorer": Moving(), "schedule": Stages({1: 0.6, 3: 0.3})}


def through_a_file(history: History, path) -> History:
    """A history that goes on with the cache it was saved as."""
    twin = history.fork()
    twin.cache = history.pipe.load_cache(history.cache.save(path))
    return twin


def filled(cache=None) -> History:
    """A padded batch after a prefill, a follow-up that revives, and decode."""
    history = new_history(tiny_model(), cache=cache or AuxCache(), **REVIVING)
    real = torch.ones(2, 24, dtype=torch.long)
    real[0, :6] = 0
    for ids, mask in ((random_ids(2, 24), real), (random_ids(2, 7, 1), None), (random_ids(2, 1, 2), None)):
        history.step(ids, mask)
    return history


@pytest.fixture
def saved(tmp_path):
    """A filled history, and the file its cache was saved to."""
    history = filled()
    return history, history.cache.save(tmp_path / "context.safetensors")


# -- what comes back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize("steps", [1, 2, 3], ids=["prefill", "revival", "decode"])
def test_a_loaded_cache_goes_on_bit_for_bit(family: str, kernel: str, steps: int, tmp_path):
    history = new_history(tiny_model(family, kernel), cache=AuxCache(), **REVIVING)
    real = torch.ones(2, 24, dtype=torch.long)
    real[0, :6] = 0
    for ids, mask in ((random_ids(2, 24), real), (random_ids(2, 7, 1), None), (random_ids(2, 1, 2), None))[:steps]:
        history.step(ids, mask)
    loaded = through_a_file(history, tmp_path / "cache")
    for ids in (random_ids(2, 5, 3), random_ids(2, 1, 4), random_ids(2, 9, 5)):
        assert torch.equal(loaded.step(ids).nan_to_num(7), history.step(ids).nan_to_num(7))
    assert any(event.rows[0].revived.numel() for step in history.steps[steps:] for event in step)
    assert_replays(loaded)


@given(st.data())
def test_any_cache_survives_a_file(tmp_path_factory, data):
    history = new_history(
        tiny_model(), cache=data.draw(st.one_of(CACHES, ROUNDING_CACHES, FORGETTING_CACHES)), **data.draw(policies())
    )
    for ids, real in data.draw(scripts(2)):
        history.step(ids, real)
    loaded = through_a_file(history, tmp_path_factory.mktemp("saved") / "cache")
    same_cache(loaded.cache, history.cache)
    ids = random_ids(2, data.draw(st.sampled_from([1, 6])))
    torch.testing.assert_close(loaded.step(ids), history.step(ids), rtol=0, atol=1e-12, equal_nan=True)


def same_cache(one, other):
    """Whether two caches hold the same in every part."""
    assert one.policy == other.policy
    assert one.marks == other.marks
    assert (one.columns, one.kv_bytes, one.aux_bytes) == (other.columns, other.kv_bytes, other.aux_bytes)
    for left, right in zip(one.rows, other.rows, strict=True):
        assert (left.marks, left.reply_start, left.counted) == (right.marks, right.reply_start, right.counted)
        assert left.retreated == right.retreated
        assert left.ledger.at_depth == right.ledger.at_depth
        assert left.ledger.knows_ids == right.ledger.knows_ids
        tensors, expected = left.state(), right.state()
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name
            assert tensor.dtype == expected[name].dtype, name


@pytest.mark.parametrize(
    "cache",
    [
        AuxCache(attend="cached"),
        DropCache(),
        OffloadedAux(),
        OffloadedAux(where="disk"),
        QuantizedAux(bits=4),
        QuantizedKV(),
        QuantizedKV(bits=4, attend="cached"),
        BudgetCache(tokens=9),
        EvictingCache(scorer=AccumulatedAttention(), budget=9, when="decode"),
    ],
    ids=str,
)
def test_every_cache_policy_saves_in_its_own_form(cache, tmp_path):
    history = filled(cache)
    loaded = through_a_file(history, tmp_path / "cache")
    same_cache(loaded.cache, history.cache)
    assert loaded.cache.offloaded_bytes == history.cache.offloaded_bytes
    with safe_open(tmp_path / "cache", "pt") as file:
        kept = file.get_tensor("1.layer2.keys").dtype
    assert kept == (torch.uint8 if isinstance(cache, QuantizedKV) else torch.float64)
    ids = random_ids(2, 6, 8)
    assert torch.equal(loaded.step(ids).nan_to_num(7), history.step(ids).nan_to_num(7))


def test_the_file_holds_what_is_in_use_and_a_little_more(saved):
    history, path = saved
    held = history.cache.kv_bytes + history.cache.aux_bytes
    assert held < path.stat().st_size < held + 25_000


def test_rows_that_are_one_are_saved_once_and_are_one_again(tmp_path):
    history = filled()
    alone = history.cache.save(tmp_path / "alone").stat().st_size
    history.cache.batch_repeat_interleave(2)
    path = history.cache.save(tmp_path / "cache")
    assert path.stat().st_size < alone + 1000
    loaded = history.pipe.load_cache(path)
    same_cache(loaded, history.cache)
    assert loaded.rows[0] is loaded.rows[1]
    assert loaded.rows[1] is not loaded.rows[2]


def test_rows_that_share_memory_are_saved_one_by_one(tmp_path):
    history = filled()
    history.cache.rows += [row.copy() for row in history.cache.rows]
    same_cache(history.pipe.load_cache(history.cache.save(tmp_path / "cache")), history.cache)


def test_a_cache_that_has_run_no_step(tmp_path):
    pipe = LazyPipeline(tiny_model(), **REVIVING)
    marks = PromptMarks(protected=((0, 2),), query=((3, 5),), asked=True, starts={"line": (0, 2)})
    path = pipe.new_cache(marks=[marks]).save(tmp_path / "cache")
    loaded = LazyPipeline(tiny_model("qwen2"), **REVIVING).load_cache(path)
    assert (loaded.columns, loaded.rows, loaded.marks) == (0, [], [marks])
    ids = random_ids(1, 20)
    with torch.no_grad(), pipe.attached(missing="nan") as model:
        got = model(ids, past_key_values=pipe.load_cache(path)).logits
        expected = model(ids, past_key_values=pipe.new_cache(marks=[marks])).logits
    assert torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


def test_a_cache_that_was_reset_still_belongs_to_its_model(saved):
    history, path = saved
    history.cache.reset()
    history.cache.save(path)
    assert history.pipe.load_cache(path).columns == 0
    with pytest.raises(CacheError, match="fingerprint"):
        LazyPipeline(tiny_model("qwen2"), cache=AuxCache(), **REVIVING).load_cache(path)


def test_what_the_text_told_is_saved_without_the_text(tmp_path):
    words = "the report of sales .\n\nwhy did sales fall ?"
    pipe = LazyPipeline(tiny_model(), word_tokenizer(words.split()), cache=AuxCache(), **REVIVING)
    cache = pipe.new_cache()
    pipe.generate([words, words], past_key_values=cache, max_new_tokens=1, do_sample=False)
    path = cache.save(tmp_path / "cache")
    loaded = pipe.load_cache(path)
    assert loaded.marks == cache.marks
    assert loaded.marks[0].asked
    assert loaded.marks[0].starts["paragraph"] == (0, 5)
    assert isinstance(loaded.rows[1].marks.query, tuple)
    assert b"sales" not in path.read_bytes()


def test_a_cache_is_saved_and_loaded_while_the_model_is_attached_too(tmp_path):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **REVIVING)
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached() as model:
        model(random_ids(1, 9), past_key_values=cache, logits_to_keep=1)
        path = cache.save(tmp_path / "cache")
        same_cache(pipe.load_cache(path), cache)
    same_cache(pipe.load_cache(path), cache)
    same_cache(pipe.load_cache(cache.save(path)), cache)


def test_a_loaded_cache_does_not_depend_on_its_file(saved):
    history, path = saved
    loaded = history.fork()
    loaded.cache = history.pipe.load_cache(path)
    path.write_bytes(bytes(path.stat().st_size))  # in place
    path.unlink()
    ids = random_ids(2, 5, 3)
    assert torch.equal(loaded.step(ids).nan_to_num(7), history.step(ids).nan_to_num(7))


def test_a_file_is_loaded_twice_and_saved_over(saved):
    history, path = saved
    one, other = history.pipe.load_cache(path), history.pipe.load_cache(path)
    one.crop(-3)
    one.save(path)
    same_cache(other, history.cache)
    same_cache(history.pipe.load_cache(path), one)


def test_marks_given_as_lists_are_saved_without_a_warning(tmp_path):
    cache = LazyPipeline(tiny_model()).new_cache(marks=[PromptMarks(protected=[(0, 2)])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.save(tmp_path / "cache")


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "a folder", "text", "an empty file", "other tensors"])
def test_what_is_no_saved_cache(what: str, tmp_path):
    path, pipe = tmp_path / "cache", LazyPipeline(tiny_model())
    if what == "a folder":
        path.mkdir()
    elif what == "text":
        path.write_text("the report of sales " * 100)
    elif what == "an empty file":
        path.touch()
    elif what == "other tensors":
        save_file({"weight": torch.ones(3)}, path)
    said = {
        "nothing": "there is no saved cache",
        "a folder": "there is no saved cache",
        "other tensors": "not one that a cache was saved to",
    }.get(what, "cannot be read as a whole safetensors file")
    with pytest.raises(CacheError, match=said) as error:
        pipe.load_cache(path)
    assert str(path) in str(error.value)


@given(st.data())
def test_a_truncated_file_is_refused(damaged, data):
    pipe, content, path = damaged
    length = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:length])
    with pytest.raises(CacheError):
        pipe.load_cache(path)


@given(st.data())
def test_a_file_with_another_byte_is_refused(damaged, data):
    pipe, content, path = damaged
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    if bytes(changed).split() != content.split():  # one space for another changes nothing
        with pytest.raises(CacheError):
            pipe.load_cache(path)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A pipeline, the bytes of a file it loads, and a place for changed ones."""
    history, folder = filled(), tmp_path_factory.mktemp("damaged")
    return history.pipe, history.cache.save(folder / "whole").read_bytes(), folder / "changed"


def contents(path):
    """Metadata and tensors of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).clone() for name in file.offset_keys()}


def rewrite(path, change):
    """Applies `change` to the tensors and the document of a file, and leaves the digest as it was."""
    metadata, tensors = contents(path)
    document = json.loads(metadata[DOCUMENT])
    change(tensors, document)
    save_file(tensors, path, {**metadata, DOCUMENT: json.dumps(document)})


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, document: tensors["0.layer1.values"].neg_(),
        lambda tensors, document: tensors["1.ledger.depth"].add_(1),
        lambda tensors, document: tensors.pop("0.frontier.packed"),
        lambda tensors, document: tensors.update({"0.memory9.states": torch.ones(2, 2)}),
        lambda tensors, document: document.update(columns=3),
        lambda tensors, document: document["rows"][0].update(reply_start=1),
        lambda tensors, document: document.update(fingerprint="0" * 32),
    ],
    ids=["values", "depth", "left out", "added", "columns", "reply", "fingerprint"],
)
def test_an_edited_file_is_refused(saved, change):
    history, path = saved
    rewrite(path, change)
    with pytest.raises(CacheError, match="was changed after it was saved"):
        history.pipe.load_cache(path)


def test_a_file_without_its_digest_is_refused(saved):
    history, path = saved
    metadata, tensors = contents(path)
    del metadata[DIGEST]
    save_file(tensors, path, metadata)
    with pytest.raises(CacheError, match="was changed after it was saved"):
        history.pipe.load_cache(path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", "no json"])
def test_a_document_that_is_none_is_refused(saved, text: str):
    history, path = saved
    save_file({}, path, {DOCUMENT: text})
    with pytest.raises(CacheError, match="says nothing about its version"):
        history.pipe.load_cache(path)


def test_a_document_of_this_version_with_other_fields_is_refused(saved, monkeypatch):
    history, path = saved
    monkeypatch.setattr("lazyllm.caches.saved._digest", lambda *_: "the same")
    history.cache.save(path)
    rewrite(path, lambda tensors, document: document.update(layer=document.pop("layers")))
    with pytest.raises(CacheError, match="unknown field 'layer'"):
        history.pipe.load_cache(path)


def test_another_version_is_refused(saved):
    history, path = saved
    rewrite(path, lambda tensors, document: document.update(version=VERSION + 1))
    with pytest.raises(CacheError, match=f"version {VERSION + 1} of the format, this lazyllm reads version {VERSION}"):
        history.pipe.load_cache(path)


@pytest.mark.parametrize("other", ["weights", "family", "dtype"])
def test_another_model_is_refused(saved, other: str):
    _, path = saved
    model = {
        "weights": lambda: tiny_model(seed=1),
        "family": lambda: tiny_model("qwen2"),
        "dtype": lambda: tiny_model.__wrapped__("llama").float(),
    }[other]()
    with pytest.raises(CacheError, match="filled by a model with the fingerprint"):
        LazyPipeline(model, cache=AuxCache(), **REVIVING).load_cache(path)
    assert LazyPipeline(tiny_model.__wrapped__("llama"), cache=AuxCache(), **REVIVING).load_cache(path).columns


def test_another_cache_policy_is_refused(saved):
    _, path = saved
    with pytest.raises(CacheError, match=r"'AuxCache'.*'max_revived': None.*'AuxCache'.*'max_revived': 3"):
        LazyPipeline(tiny_model(), cache=AuxCache(max_revived=3), **REVIVING).load_cache(path)
    other = LazyPipeline(tiny_model(), cache=AuxCache(), scorer="Random", schedule=Stages({2: 0.5}))
    assert other.load_cache(path).columns, "scorer and schedule may be others"


def test_a_recipe_has_no_model_to_load_for(saved):
    with pytest.raises(ConfigError, match="bind"):
        LazyPipeline(cache=AuxCache()).load_cache(saved[1])


def test_a_cache_whose_model_is_gone(tmp_path):
    cache = LazyCache(AuxCache())
    cache.bind(torch.nn.Linear(2, 2))
    with pytest.raises(CacheError, match="is gone"):
        cache.save(tmp_path / "cache")


# -- what cannot be written --------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int):
    """No file grows beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_rest(saved):
    history, path = saved
    before = path.read_bytes()
    history.step(random_ids(2, 5, 3))
    with files_of_at_most(4096), pytest.raises(CacheError, match="cannot be saved as"):
        history.cache.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_half_way_leaves_the_old_file_and_no_rest(saved, monkeypatch):
    history, path = saved
    before = path.read_bytes()

    def fail(tensors, unfinished, metadata):
        assert os.path.dirname(unfinished) == str(path.parent), "on another disk it could not be moved in one piece"
        unfinished.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lazyllm.caches.saved.save_file", fail)
    with pytest.raises(CacheError, match="No space left on device") as error:
        history.cache.save(path)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/cache", "file/cache", "folder"])
def test_a_place_that_cannot_be_written_to(where: str, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(CacheError, match="cannot be saved as"):
        filled().cache.save(tmp_path / where)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert not list((tmp_path / "folder").iterdir())
