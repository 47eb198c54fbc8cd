"""Scorers against the paper's formula on materialised attention, and against their contract."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lazyllm import (
    SCORERS,
    AuxCache,
    LastTokenAttention,
    LazyPipeline,
    Protect,
    Random,
    ScoreContext,
    Scorer,
    SinkRecent,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.models.attention import AttentionInputs
from lazyllm.policies.scorers.composed import ComposedScorer
from tests.replay import replay
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model


class Spy(ComposedScorer):
    """Keeps what another scorer was shown and what it said."""

    inner: Scorer
    seen: list

    @property
    def parts(self):
        return (self.inner,)

    def score(self, context: ScoreContext) -> torch.Tensor:
        scores = self.inner.score(context)
        self.seen.append((context, scores))
        return scores


def scores_of(model, ids, scorer: Scorer, cache=None) -> list[tuple[ScoreContext, torch.Tensor]]:
    """Runs a prefill that scores after layers 0, 1 and 2 while pruning next to nothing."""
    spy = Spy(inner=scorer, seen=[])
    length = ids.shape[1]
    stages = Stages({layer: 1 - layer / length for layer in range(1, LAYERS)})
    pipe = LazyPipeline(model, scorer=spy, schedule=stages, cache=cache or AuxCache())
    with torch.no_grad(), pipe.attached(missing="nan"):
        model(ids, past_key_values=pipe.new_cache())
    return spy_of(pipe).seen


def spy_of(pipe: LazyPipeline) -> Spy:
    assert isinstance(pipe.config.scorer, Spy)
    return pipe.config.scorer


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_last_token_attention_is_equation_1_of_the_paper(family: str, kernel: str):
    ids = random_ids(1, 20)
    with torch.no_grad():
        attention = tiny_model(family, "eager")(ids, output_attentions=True).attentions
    (context, scores), *_ = scores_of(tiny_model(family, kernel), ids, LastTokenAttention())
    assert context.layer == 0
    torch.testing.assert_close(scores, attention[0][0, :, -1].mean(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize("heads", ["mean", "max"])
def test_window_attention_is_pooled_attention_of_the_last_queries(family: str, kernel: str, heads: str):
    ids = random_ids(1, 20)
    with torch.no_grad():
        attention = tiny_model(family, "eager")(ids, output_attentions=True).attentions[0][0, :, -5:].mean(1)
    joined = attention.mean(0) if heads == "mean" else attention.amax(0)
    expected = torch.stack([joined[max(0, i - 1) : i + 2].max() for i in range(20)])
    (_, scores), *_ = scores_of(tiny_model(family, kernel), ids, WindowAttention(window=5, heads=heads, pool=3))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_attention_after_pruning_is_over_the_tokens_that_were_attended(family: str, kernel: str):
    seen = scores_of(tiny_model(family, kernel), random_ids(1, 20), LastTokenAttention())
    assert [context.layer for context, _ in seen] == [0, 1, 2]
    for removed, (context, scores) in enumerate(seen):
        assert context.tokens.numel() == scores.numel() == 20 - removed
        assert scores.sum() <= 1 + 1e-12
        assert scores.sum() >= 1 - 1e-12


def test_scoring_makes_no_square_matrix():
    sizes = []
    original = torch.matmul

    def matmul(left, right, **options):
        out = original(left, right, **options)
        sizes.append(out.numel())
        return out

    model, ids = tiny_model(), random_ids(1, 200)
    torch.matmul = matmul
    try:
        scores_of(model, ids, WindowAttention(window=4))
    finally:
        torch.matmul = original
    assert sizes
    assert max(sizes) == 4 * 200 * model.config.num_attention_heads


def test_attention_sinks_take_their_share_of_the_probability():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 1, 8, generator=generator), torch.randn(2, 6, 8, generator=generator)
    tokens, sinks = torch.arange(6), torch.randn(4, generator=generator)
    inputs = AttentionInputs(queries, tokens[-1:], keys, tokens, tokens, keys, 0.5, None, None, sinks)
    logits = torch.einsum("hqd,hkd->hqk", queries, keys.repeat_interleave(2, 0)) * 0.5
    expected = torch.cat([logits, sinks[:, None, None]], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(inputs.probabilities(1), expected)


def test_tokens_of_an_image_see_each_other():
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(4, 5, 8, generator=generator), torch.randn(2, 6, 8, generator=generator)
    tokens, reach = torch.arange(6), torch.tensor([1, 4, 4, 4, 5])
    inputs = AttentionInputs(queries, tokens[1:], keys, tokens, tokens, keys, 0.5, None, None, None, query_reach=reach)
    logits = torch.einsum("hqd,hkd->hqk", queries, keys.repeat_interleave(2, 0)) * 0.5
    expected = logits.masked_fill(tokens > reach[:, None], -torch.inf).softmax(-1)
    torch.testing.assert_close(inputs.probabilities(5), expected)
    torch.testing.assert_close(inputs.probabilities(2), expected[:, 3:])
    torch.testing.assert_close(inputs.received(), expected.sum(1))


def context_of(tokens: list[int], context_tokens: int) -> ScoreContext:
    index = torch.tensor(tokens)
    return ScoreContext(
        layer=0,
        tokens=index,
        positions=index,
        context_tokens=context_tokens,
        query=index[-1:],
        computed=index,
        states=torch.zeros(len(tokens), 4),
        attention=None,
    )


@given(st.sets(st.integers(0, 99), min_size=1), st.integers(0, 2**32 - 1))
def test_random_scores_belong_to_the_token_and_the_seed(tokens, seed):
    chosen = sorted(tokens)
    scores = Random(seed).score(context_of(chosen, 100))
    everything = Random(seed).score(context_of(list(range(100)), 100))
    assert torch.equal(scores, everything[chosen])
    assert 0 <= scores.min() <= scores.max() < 1


def test_random_scores_spread_evenly_and_differ_between_seeds():
    tokens = context_of(list(range(4000)), 4000)
    scores = Random(3).score(tokens)
    counts = torch.histc(scores, bins=10, min=0, max=1)
    assert 320 < counts.min() <= counts.max() < 480
    other = Random(4).score(tokens)
    assert abs(torch.corrcoef(torch.stack([scores, other]))[0, 1]) < 0.05


def test_sink_recent_keeps_the_start_and_the_end():
    scores = SinkRecent(2).score(context_of([0, 1, 4, 5, 9], 10))
    assert scores.argsort(descending=True).tolist() == [1, 0, 4, 3, 2]


FIELDS = {
    "LateInteraction": {"query": 4},
    "LexicalOverlap": {"query": 4},
    "TwoHop": {"scorer": "LateInteraction(query=4)", "tokens": 3},
    "Pooled": {"scorer": "LastTokenAttention", "width": 3},
    "Blockwise": {"scorer": "LateInteraction(query=4)", "size": 8},
    "Combined": {"scorers": {"Random": 1.0, "LexicalOverlap(query=4)": 0.5}},
    "Oracle": {"answer": [5, 7]},
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_says_where_it_comes_from_and_runs(name: str):
    cls = SCORERS[name]
    assert "Source:" in (cls.__doc__ or "") or issubclass(cls, ComposedScorer)
    scorer = {"name": name, **FIELDS.get(name, {})}
    pipe = LazyPipeline(
        tiny_model(), scorer=scorer, schedule=Stages({1: 0.5}), cache=AuxCache(), protect=Protect(sinks=1)
    )
    result = pipe.generate(random_ids(1, 40)[0], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert result.stats.tokens_per_layer[0][1].visible == 20


def test_a_step_that_revives_scores_by_the_new_token_and_not_by_the_revived_ones():
    model, ids = tiny_model(), random_ids(1, 24)
    spy, trace = Spy(inner=LastTokenAttention(), seen=[]), TokenTrace()
    pipe = LazyPipeline(
        model, scorer=spy, schedule=Stages({1: 0.6, 2: 0.4}), cache=AuxCache(), callbacks=[trace], protect=Protect()
    )
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached():
        model(ids[:, :18], past_key_values=cache, logits_to_keep=1)
        for token in range(18, 24):
            model(ids[:, token : token + 1], past_key_values=cache, logits_to_keep=1)
    revived = [step for step in range(1, 7) if trace.steps[step][1].rows[0].revived.numel()]
    assert revived, "some step must revive at layer 1"
    _, states = replay(model, ids[0], trace.steps, 0)
    layer = model.get_decoder().layers[1]
    scored = [context for context, _ in spy_of(pipe).seen if context.layer == 1]
    for step in revived:
        token = 17 + step
        query = layer.self_attn.q_proj(layer.input_layernorm(states[1][token])).view(1, 4, 1, 8)
        rope = model.get_decoder().rotary_emb(query, torch.tensor([[token]]))
        expected, _ = apply_rotary_pos_emb(query, query, *rope)
        (context,) = [context for context in scored if context.context_tokens == token + 1]
        torch.testing.assert_close(context.attention.queries, expected[0], rtol=0, atol=1e-10)
