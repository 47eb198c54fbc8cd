"""What an inspected generation says agrees with what was computed; no browser."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import InputError, LazyPipeline, TokenTrace
from lazyllm.models.names import CACHE_NAMES
from lazyllm.pages.inspection import record, save_inspection
from lazyllm.pages.pieces import prompt_pieces, reply_pieces
from lazyllm.pages.render import as_json
from tests.pages import HOSTILE, LAYERS, byte_model, byte_tokenizer, pruning_pipe

PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. What did they do?"
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def inspection():
    return record(pruning_pipe(), PROMPT, max_new_tokens=6, do_sample=False)


# -- choices ---------------------------------------------------------------------------------------


def choices(**policies) -> list:
    tracer = TokenTrace()
    pipe = pruning_pipe(**policies)
    LazyPipeline.from_config(pipe.config, pipe.model, pipe.tokenizer, callbacks=[tracer]).generate(
        PROMPT, max_new_tokens=4, do_sample=False
    )
    return [(step, event.layer, event.rows[0]) for step, events in enumerate(tracer.steps) for event in events]


def test_a_trace_says_what_the_visible_tokens_were_chosen_from():
    prefill = [(layer, row) for step, layer, row in choices() if step == 0]
    assert [layer for layer, row in prefill if row.choice is not None] == [1, 3]
    visible = torch.arange(len(PROMPT))
    for _, row in prefill:
        if row.choice is not None:
            choice, entered = row.choice, torch.isin(visible, row.visible)
            assert torch.equal(choice.candidates, visible)
            assert bool(entered[choice.protected].all())
            free = ~choice.protected
            assert choice.scores[free & entered].min() >= choice.scores[free & ~entered].max()
        visible = row.visible


def test_no_choice_is_told_where_nothing_is_pruned():
    assert all(row.choice is None for _, _, row in choices(schedule="Constant(1.0)"))


def test_what_is_protected_is_told_as_it_was_before_the_best_were_added():
    (row,) = [row for step, layer, row in choices() if step == 0 and layer == 1]
    assert row.choice.protected.sum() == 2 + 3
    assert row.visible.numel() == len(PROMPT) // 2


# -- pieces ----------------------------------------------------------------------------------------


@given(TEXTS)
def test_pieces_of_a_prompt_are_its_text(text: str):
    encoded = pruning_pipe().encode(text)
    pieces = prompt_pieces(encoded, byte_tokenizer())
    assert len(pieces) == len(encoded.token_ids)
    assert "".join(pieces) == text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_pieces_of_a_reply_are_its_text(token_ids: list[int]):
    pieces = reply_pieces(token_ids, byte_tokenizer())
    assert len(pieces) == len(token_ids)
    assert "".join(pieces) == byte_tokenizer().decode(token_ids)


def test_without_a_tokenizer_ids_are_shown():
    pipe = LazyPipeline(byte_model())
    found = record(pipe, [5, 6, 7], max_new_tokens=2, do_sample=False)
    assert found.pieces == ["5 ", "6 ", "7 "]
    assert len(found.reply) == 2


# -- what was computed -----------------------------------------------------------------------------


def test_depths_agree_with_the_statistics(inspection):
    prefill = inspection.stats.tokens_per_layer[0]
    for layer in range(LAYERS):
        assert (inspection.depths[0] > layer).sum() == prefill[layer].computed
    assert (inspection.depths[-1] - inspection.depths[0]).sum() == inspection.stats.revived_tokens > 0


def test_every_cut_splits_its_candidates_into_deeper_and_not(inspection):
    assert [cut.layer for cut in inspection.cuts] == [1, 3]
    for cut in inspection.cuts:
        scored = ~np.isnan(cut.scores)
        assert scored.sum() == cut.candidates == (inspection.depths[0] >= cut.layer).sum()
        assert np.array_equal(cut.entered, inspection.depths[0] > cut.layer)
        assert sorted(cut.ranks[scored]) == list(range(1, cut.candidates + 1))
        assert np.array_equal(np.argsort(-cut.scores[scored], kind="stable"), np.argsort(cut.ranks[scored]))


def test_every_revival_names_a_token_that_had_stopped_at_its_layer(inspection):
    found = 0
    for before, after, step in zip(inspection.depths, inspection.depths[1:], inspection.steps[1:], strict=False):
        for revival in step.revivals:
            assert before[revival.token] == revival.layer < after[revival.token]
            found += 1
    assert found


def test_query_and_protected_tokens_are_told():
    pipe = pruning_pipe(scorer="LateInteraction")
    found = record(pipe, PROMPT, query="What did they do?", max_new_tokens=2, do_sample=False)
    asked = PROMPT.index("What")
    assert np.array_equal(np.flatnonzero(found.query), np.arange(asked, len(PROMPT)))
    assert found.protected[found.query].all()
    assert list(np.flatnonzero(~found.protected)) == list(range(2, asked))


def test_the_pipelines_own_callbacks_are_told_too():
    tracer, pipe = TokenTrace(), pruning_pipe()
    own = LazyPipeline.from_config(pipe.config, pipe.model, pipe.tokenizer, callbacks=[tracer])
    record(own, PROMPT, max_new_tokens=3, do_sample=False)
    assert len(tracer.steps) == 3


@pytest.mark.parametrize("cache", ["DenseCache", "DropCache", "BudgetCache(tokens=24)", "AuxCache(decode='reuse')"])
def test_every_kind_of_cache_can_be_looked_into(cache, tmp_path):
    found = record(pruning_pipe(cache=cache), PROMPT, max_new_tokens=4, do_sample=False)
    assert len(found.steps) == 4
    assert save_inspection(found, tmp_path / "page.html").exists()


# -- the file --------------------------------------------------------------------------------------


@given(
    st.recursive(
        st.text() | st.text("<>&/!-\u2028\ud800") | st.integers(),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )
)
def test_data_in_a_page_is_plain_ascii_that_ends_no_script(data):
    text = as_json(data)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == data


def test_the_same_generation_gives_the_same_bytes(inspection, tmp_path):
    pages = [save_inspection(inspection, tmp_path / f"{name}.html").read_bytes() for name in "ab"]
    assert pages[0] == pages[1]


def test_a_page_names_nothing_outside_itself(inspection, tmp_path):
    text = save_inspection(replace(inspection, model=HOSTILE), tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("<script") == 2
    assert "default-src 'none'" in text


def test_what_cannot_be_shown_is_refused(tmp_path):
    pipe = pruning_pipe()
    with pytest.raises(InputError, match="not a batch"):
        record(pipe, [PROMPT, PROMPT])
    with pytest.raises(InputError, match="num_beams=2"):
        record(pipe, PROMPT, num_beams=2)
    for name in CACHE_NAMES:
        with pytest.raises(InputError, match=f"leave {name} out"):
            record(pipe, PROMPT, **{name: pipe.new_cache()})


def test_a_page_that_cannot_be_written_is_an_input_error(inspection, tmp_path):
    with pytest.raises(InputError, match=r"cannot write the page .*No such file"):
        save_inspection(inspection, tmp_path / "nowhere" / "page.html")
