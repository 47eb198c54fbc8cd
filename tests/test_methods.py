"""Published methods against their formulas, computed from attention, values and logits of the unmodified model."""

import math
from typing import Any

import pytest
import torch

from lazyllm import (
    AccumulatedAttention,
    AuxCache,
    Combined,
    ConfigError,
    Constant,
    DraftModel,
    DropCache,
    EvictingCache,
    InputError,
    KeyNorm,
    LateInteraction,
    LazyPipeline,
    MultiLayerAttention,
    NextLayerAttention,
    Oracle,
    Protect,
    Random,
    SelfInformation,
    Stages,
    Uniform,
    UpdateNorm,
    ValueWeightedAttention,
)
from lazyllm.models.families import contract_of
from tests.histories import new_history
from tests.replay import assert_replays
from tests.test_scorers import Spy, context_of, spy_of
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model, word_tokenizer

LENGTH = 20
GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": -1}


def dense_attention(family: str, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """By layer, attention [b, h, q, k] of the unmodified model."""
    with torch.no_grad():
        return tiny_model(family, "eager")(ids, output_attentions=True).attentions


def scores_before(layer: int, model, ids: torch.Tensor, scorer, *, steps: int = 0) -> torch.Tensor:
    """Scores of a prefill, or of the last of so many decode steps after it, at the one cut before `layer`."""
    spy = Spy(inner=scorer, seen=[])
    pipe = LazyPipeline(model, scorer=spy, schedule=Stages({layer: 0.5}), cache=AuxCache())
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached(missing="nan"):
        model(ids[:, : ids.shape[1] - steps], past_key_values=cache)
        for step in range(ids.shape[1] - steps, ids.shape[1]):
            model(ids[:, step : step + 1], past_key_values=cache)
    return spy_of(pipe).seen[-1][1]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_accumulated_attention_sums_over_all_queries(family: str, kernel: str):
    ids = random_ids(1, LENGTH)
    expected = dense_attention(family, ids)[0][0]
    close(scores_before(1, tiny_model(family, kernel), ids, AccumulatedAttention()), expected.sum(1).mean(0))
    few = scores_before(1, tiny_model(family, kernel), ids, AccumulatedAttention(window=3, heads="max"))
    close(few, expected[:, -3:].sum(1).amax(0))


def test_accumulated_attention_goes_on_through_decode():
    ids = random_ids(1, LENGTH)
    expected = dense_attention("llama", ids)[0][0].sum(1).mean(0)
    close(scores_before(1, tiny_model(), ids, AccumulatedAttention(), steps=6), expected)


@pytest.mark.parametrize("scorer", [AccumulatedAttention(), UpdateNorm()], ids=str)
def test_what_is_added_up_or_remembered_covers_steps_in_which_nobody_asks(scorer):
    ids = random_ids(1, LENGTH)
    spy = Spy(inner=scorer, seen=[])
    pipe = LazyPipeline(tiny_model(), scorer=spy, schedule=Stages({1: 0.5}), cache=AuxCache(decode="reuse"))
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached(missing="nan") as model:
        for start, stop in ((0, 12), (12, 13), (13, 14), (14, 15), (15, LENGTH)):
            model(ids[:, start:stop], past_key_values=cache)
    context, scores = spy_of(pipe).seen[-1]
    assert len(spy_of(pipe).seen) == 2, "decode steps ask nothing"
    assert context.tokens.numel() == LENGTH
    close(scores, scores_before(1, tiny_model(), ids, scorer))


def test_accumulated_attention_is_the_same_in_blocks(monkeypatch):
    ids = random_ids(1, LENGTH)
    whole = scores_before(1, tiny_model(), ids, AccumulatedAttention())
    monkeypatch.setattr("lazyllm.models.attention.BLOCK", 3)
    close(scores_before(1, tiny_model(), ids, AccumulatedAttention()), whole)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize("join", ["max", "mean"])
def test_multi_layer_attention_joins_the_latest_layers(family: str, kernel: str, join: str):
    ids = random_ids(1, LENGTH)
    layers = torch.stack([one[0, :, -4:].mean((0, 1)) for one in dense_attention(family, ids)[1:3]])
    expected = layers.amax(0) if join == "max" else layers.mean(0)
    scorer = MultiLayerAttention(layers=2, window=4, join=join)
    close(scores_before(3, tiny_model(family, kernel), ids, scorer), expected)


def test_multi_layer_attention_takes_the_layers_that_have_run():
    ids = random_ids(1, LENGTH)
    expected = dense_attention("llama", ids)[0][0, :, -4:].mean((0, 1))
    close(scores_before(1, tiny_model(), ids, MultiLayerAttention(layers=9, window=4)), expected)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_next_layer_attention_is_the_next_layers_own(family: str, kernel: str):
    ids = random_ids(1, LENGTH)
    expected = dense_attention(family, ids)[2][0, :, -4:].mean((0, 1))
    close(scores_before(2, tiny_model(family, kernel), ids, NextLayerAttention(window=4)), expected)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_next_layer_attention_can_prune_before_layer_0(family: str, kernel: str):
    ids = random_ids(1, LENGTH)
    expected = dense_attention(family, ids)[0][0, :, -4:].mean((0, 1))
    close(scores_before(0, tiny_model(family, kernel), ids, NextLayerAttention(window=4)), expected)


@pytest.mark.parametrize("cache", [DropCache(), DropCache(attend="cached"), EvictingCache(budget=9)], ids=str)
@pytest.mark.parametrize("stages", [{1: 0.7, 2: 0.5}, {0: 0.7, 2: 0.5}], ids=str)
def test_next_layer_attention_leaves_out_what_cannot_be_revived(cache, stages):
    history = new_history(tiny_model(), scorer=NextLayerAttention(window=4), schedule=Stages(stages), cache=cache)
    for length in (14, 1, 6, 1, 5):
        history.step(random_ids(2, length, length))
    assert_replays(history)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_next_layer_attention_stores_nothing(family: str, kernel: str):
    scorer = NextLayerAttention(window=4)
    history = new_history(
        tiny_model(family, kernel), scorer=scorer, schedule=Stages({1: 0.7, 2: 0.5}), cache=AuxCache()
    )
    history.step(random_ids(2, 12))
    for seed in range(1, 5):
        history.step(random_ids(2, 1, seed))
    assert_replays(history)
    for row in history.cache.rows:
        for layer, store in enumerate(row.stores):
            assert sorted(store.tokens.tolist()) == torch.nonzero(row.ledger.depth > layer).flatten().tolist()


def entering(model, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """Normalised states [t, c] that the attention of a layer reads."""
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[layer]
        return model.get_decoder().layers[layer].input_layernorm(states)[0]


def test_value_weighted_attention_is_attention_times_the_size_of_values():
    model, ids = tiny_model(), random_ids(1, LENGTH)
    attention = model.get_decoder().layers[1].self_attn
    values = attention.v_proj(entering(model, ids, 1)).view(LENGTH, 2, 8)
    sizes = values.abs().sum(-1).T.repeat_interleave(2, 0)
    expected = (dense_attention("llama", ids)[1][0, :, -5:].mean(1) * sizes).mean(0)
    close(scores_before(2, model, ids, ValueWeightedAttention(window=5)), expected)


def test_key_norm_is_the_mean_length_of_the_keys():
    model, ids = tiny_model(), random_ids(1, LENGTH)
    attention = model.get_decoder().layers[1].self_attn
    keys = attention.k_proj(entering(model, ids, 1)).view(LENGTH, 2, 8)
    lengths = keys.norm(dim=-1).mean(-1)
    found = scores_before(2, model, ids, KeyNorm())
    torch.testing.assert_close(found, lengths.max() - lengths, rtol=0, atol=1e-6)  # RoPE turns keys in float32


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_update_norm_is_the_length_of_what_attention_gives(family: str, kernel: str):
    model, ids = tiny_model(family, kernel), random_ids(1, LENGTH)
    noted = []
    hook = model.get_decoder().layers[1].self_attn.register_forward_hook(lambda *call: noted.append(call[2][0][0]))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[2][0]
    hook.remove()
    expected = noted[0].norm(dim=-1)
    close(scores_before(2, model, ids, UpdateNorm()), expected)
    close(scores_before(2, model, ids, UpdateNorm(relative=True)), expected / states.norm(dim=-1))


def test_update_norm_remembers_tokens_of_earlier_steps_and_goes_through_in_pieces():
    model, ids = tiny_model(), random_ids(1, LENGTH)
    whole = scores_before(1, model, ids, UpdateNorm())
    close(scores_before(1, model, ids, UpdateNorm(), steps=5), whole)
    spy = Spy(inner=UpdateNorm(), seen=[])
    pipe = LazyPipeline(model, scorer=spy, schedule=Stages({1: 0.5}), chunk=3)
    with torch.no_grad(), pipe.attached(missing="nan"):
        model(ids, past_key_values=pipe.new_cache())
    close(spy_of(pipe).seen[-1][1], whole)


def test_update_norm_refuses_a_layer_without_one_attention_module():
    model = tiny_model(seed=3)
    layer = model.get_decoder().layers[2]
    layer.mlp.layer_idx = 2
    try:
        with pytest.raises(ConfigError, match=r"layer 2 of LlamaForCausalLM"):
            LazyPipeline(model, scorer=UpdateNorm())
    finally:
        del layer.mlp.layer_idx
    assert contract_of(model).attention_of(2) is layer.self_attn


def test_self_information_is_the_dense_models_surprise():
    model, ids = tiny_model(), random_ids(1, LENGTH)
    with torch.no_grad():
        told = model(ids).logits[0].log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    scores = scores_before(1, model, ids, SelfInformation())
    torch.testing.assert_close(scores.double(), torch.cat([torch.zeros(1), -told]).double(), rtol=0, atol=1e-5)


def test_self_information_is_the_same_in_chunks(monkeypatch):
    ids = random_ids(1, LENGTH)
    whole = scores_before(1, tiny_model(), ids, SelfInformation())
    monkeypatch.setattr("lazyllm.models.reader.CHUNK", 7)
    close(scores_before(1, tiny_model(), ids, SelfInformation()), whole)


@pytest.mark.parametrize("across", ["max", "mean", "last"])
def test_draft_model_reads_the_last_tokens_attention_of_its_layers(across: str):
    ids = random_ids(1, LENGTH)
    last = torch.stack([layer[0, :, -1] for layer in dense_attention("llama", ids)[:3]])
    expected = {"max": last.amax((0, 1)), "mean": last.mean((0, 1)), "last": last[-1].mean(0)}[across]
    close(scores_before(1, tiny_model(), ids, DraftModel(layers=3, across=across)), expected)
    close(scores_before(1, tiny_model(), ids, DraftModel(layers=0.75, across=across)), expected)


def test_draft_model_looks_ahead_along_its_own_continuation():
    model, ids = tiny_model(kernel="eager"), random_ids(1, LENGTH)
    with torch.no_grad():
        whole = model.generate(ids, max_new_tokens=3, **GREEDY, attention_mask=torch.ones_like(ids))
        attention = torch.stack(model(whole[:, :-1], output_attentions=True).attentions)[:, 0]
    expected = attention[:, :, -3:, :LENGTH].amax((0, 1)).mean(0)
    close(scores_before(1, model, ids, DraftModel(look_ahead=3)), expected)


def test_oracle_reads_the_answers_attention():
    ids, answer = random_ids(1, LENGTH), (5, 9, 11)
    whole = torch.cat([ids, torch.tensor([answer])], dim=1)
    attention = torch.stack(dense_attention("llama", whole))[:, 0, :, -3:, :LENGTH]
    close(scores_before(1, tiny_model(), ids, Oracle(answer=answer)), attention.mean((0, 1, 2)))
    close(scores_before(1, tiny_model(), ids, Oracle(answer=answer, across="max")), attention.amax((0, 1)).mean(0))


def test_oracle_takes_text_where_there_is_a_tokenizer():
    tokenizer = word_tokenizer(["alpha", "beta", "gamma"])
    answer = tuple(tokenizer("beta gamma", add_special_tokens=False)["input_ids"])
    prompt = "alpha beta " * 10
    kept = []
    for given in ("beta gamma", answer):
        pipe = LazyPipeline(tiny_model(), tokenizer, scorer=Oracle(answer=given), schedule="Constant(0.5, start=0)")
        kept.append(pipe.generate(prompt, max_new_tokens=3, **GREEDY).token_ids)
    assert kept[0] == kept[1]
    pipe = LazyPipeline(tiny_model(), scorer=Oracle(answer="beta"), schedule="Constant(0.5, start=0)")
    with pytest.raises(InputError, match=r"'beta' is text, and the pipeline has no tokenizer"):
        pipe.generate(random_ids(1, LENGTH)[0], max_new_tokens=1)


def test_uniform_keeps_evenly_spaced_tokens():
    scores = Uniform().score(context_of(list(range(64)), 64))
    for kept in (2, 4, 8, 16, 32):
        tokens = scores.topk(kept).indices.sort().values
        assert tokens.diff().unique().numel() == 1
    assert 0 < scores.min() < scores.max() <= 1
    assert torch.equal(Uniform().score(context_of([3, 9, 40], 64)), scores[[3, 9, 40]])


# -- language models that read the prompt ---------------------------------------------------------------


READING = [SelfInformation(), DraftModel(layers=2, across="last"), DraftModel(look_ahead=3), Oracle(answer=(5, 9))]


@pytest.mark.parametrize("scorer", READING, ids=str)
@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_reading_with_the_model_that_runs_disturbs_nothing(scorer, family: str, kernel: str):
    model = tiny_model(family, kernel)
    history = new_history(model, scorer=scorer, schedule=Stages({0: 0.6, 2: 0.4}), cache=AuxCache())
    real = torch.ones(2, 14, dtype=torch.long)
    real[0, :5] = 0
    history.step(random_ids(2, 14), real)
    for seed in range(1, 4):
        history.step(random_ids(2, 1, seed))
    history.step(random_ids(2, 4, 7))
    assert_replays(history)


def test_work_of_reading_is_counted():
    ids = random_ids(1, 60)[0]
    options = {"schedule": Constant(0.5, start=0), "cache": DropCache()}
    draft = DraftModel(layers=2, across="last")
    counted = LazyPipeline(tiny_model(), scorer=draft, **options).generate(ids, max_new_tokens=3, **GREEDY).stats
    plain = LazyPipeline(tiny_model(), scorer=Random(), **options).generate(ids, max_new_tokens=3, **GREEDY).stats
    dense = LazyPipeline.from_preset("dense", tiny_model()).generate(ids, max_new_tokens=1, **GREEDY).stats
    assert plain.reading_flops == 0
    assert counted.flops == plain.flops + counted.reading_flops
    head = tiny_model().get_output_embeddings().weight.numel() * 2
    assert counted.reading_flops == (dense.flops - head) * 2 // LAYERS
    assert counted.predicted_speedup < plain.predicted_speedup


def test_a_batch_shares_the_work_of_reading():
    prompts = list(random_ids(2, 30))
    pipe = LazyPipeline(tiny_model(), scorer=SelfInformation(), schedule=Constant(0.5, start=0), cache=DropCache())
    both = pipe.generate(prompts, max_new_tokens=2, **GREEDY)
    alone = [pipe.generate(prompt, max_new_tokens=2, **GREEDY) for prompt in prompts]
    assert [one.token_ids for one in both] == [one.token_ids for one in alone]
    assert [one.stats.reading_flops for one in both] == [one.stats.reading_flops for one in alone]


@pytest.fixture(scope="module")
def draft_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("draft")
    tiny_model(layers=2, seed=5).save_pretrained(folder)
    word_tokenizer(["alpha", "beta"]).save_pretrained(folder)
    return str(folder)


def test_a_draft_model_of_its_own_chooses(draft_folder: str):
    tokenizer = word_tokenizer(["alpha", "beta"])
    prompt = "alpha beta beta " * 8
    pipe = LazyPipeline(
        tiny_model(), tokenizer, scorer=DraftModel(model=draft_folder), schedule="Constant(0.5, start=0)"
    )
    stats = pipe.generate(prompt, max_new_tokens=2, **GREEDY).stats
    ids = torch.tensor([pipe.encode(prompt).token_ids])
    draft = tiny_model(layers=2, seed=5)
    assert 0 < stats.reading_flops < stats.flops
    spy = Spy(inner=DraftModel(model=draft_folder), seen=[])
    spied = LazyPipeline(tiny_model(), tokenizer, scorer=spy, schedule="Constant(0.5, start=0)")
    with torch.no_grad():
        with spied.attached(missing="nan") as model:
            model(ids, past_key_values=spied.new_cache())
        draft.set_attn_implementation("eager")
        attention = torch.stack(draft(ids, output_attentions=True).attentions)[:, 0, :, -1]
        draft.set_attn_implementation("sdpa")
    close(spy_of(spied).seen[0][1], attention.amax((0, 1)))


def test_a_draft_model_with_another_tokenizer_is_refused(draft_folder: str):
    with pytest.raises(ConfigError, match=r"another tokenizer: 1 of its 8 tokens"):
        LazyPipeline(tiny_model(), word_tokenizer(["alpha", "gamma"]), scorer=DraftModel(model=draft_folder))


def test_a_draft_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no-such-folder"):
        LazyPipeline(tiny_model(), scorer=SelfInformation(model=str(tmp_path / "no-such-folder")))


@pytest.mark.parametrize("scorer", [SelfInformation(), DraftModel(), Oracle(answer=(4,))], ids=str)
def test_readers_need_token_ids(scorer):
    pipe = LazyPipeline(tiny_model(), scorer=scorer, schedule="Constant(0.5, start=0)")
    embeddings = tiny_model().get_input_embeddings()(random_ids(1, 9))
    with pytest.raises(InputError, match="inputs_embeds"), torch.no_grad(), pipe.attached() as model:
        model(inputs_embeds=embeddings, past_key_values=pipe.new_cache(), logits_to_keep=1)


def test_parts_that_keep_different_things_are_refused():
    scorer = Combined([(LateInteraction(query=4), 1.0), (UpdateNorm(), 1.0)])
    with pytest.raises(ConfigError, match="LateInteraction and UpdateNorm keep different things"):
        LazyPipeline(tiny_model(), scorer=scorer, schedule=Stages({1: 0.5}), protect=Protect())
    assert math.isfinite(scorer.compares)
