"""The paper's arithmetic and its figure."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AuxCache,
    LastTokenAttention,
    LazyConfig,
    LazyPipeline,
    Protect,
    ScoreContext,
    Scorer,
    Stages,
    TokenTrace,
)
from tests.replay import replay
from tests.tiny import random_ids, tiny_model


def test_the_papers_schedule_gives_the_papers_counts_on_32_layers():
    model = tiny_model(layers=32)
    pipe = LazyPipeline.from_preset("paper", model)
    stats = pipe.generate(random_ids(1, 200)[0], max_new_tokens=1).stats
    computed = [layer.computed for layer in stats.tokens_per_layer[0]]
    assert computed == [200] * 9 + [140] * 10 + [98] * 9 + [68] * 4
    assert stats.prefill_computed_fraction == sum(computed) / (32 * 200)


def test_figure_4_stages_are_fractions_of_the_whole_context_not_of_the_survivors():
    ratios = LazyConfig.preset("paper").schedule.resolve(32)
    assert [ratios.index(keep) for keep in (0.7, 0.49, 0.343)] == [9, 19, 28]
    assert ratios[0] == 1.0


class Scripted(Scorer):
    """Leaves out the given token until the context has `until` tokens, then prefers it."""

    token: int
    until: int

    def score(self, context: ScoreContext) -> torch.Tensor:
        scores = context.tokens.double()
        scores[context.tokens == self.token] = 1e9 if context.context_tokens >= self.until else -1
        return scores


def test_a_token_pruned_in_prefill_is_revived_two_steps_later_with_the_kv_it_would_have_had():
    """The paper's Figure 4: T is pruned after layer 1, comes back in the second decode step."""
    model, ids, token = tiny_model(), random_ids(1, 10), 4
    trace = TokenTrace()
    pipe = LazyPipeline(
        model,
        scorer=Scripted(token=token, until=12),
        schedule=Stages({2: 0.9}),
        cache=AuxCache(),
        protect=Protect(generated=False),
    )
    cache = pipe.new_cache()
    everything = torch.cat([ids, random_ids(1, 2, 1)], dim=1)
    with torch.no_grad(), pipe.attached(callbacks=[trace], missing="nan"):
        model(ids, past_key_values=cache)
        row = cache.rows[0]
        assert row.ledger.depth[token] == 2
        assert row.frontier.tokens.tolist() == [token]
        for step in (10, 11):
            model(everything[:, step : step + 1], past_key_values=cache, logits_to_keep=1)
    assert row.ledger.depth[token] == 4
    assert trace.steps[1][2].rows[0].revived.tolist() == []
    assert trace.steps[2][2].rows[0].revived.tolist() == [token]

    _, states = replay(model, everything[0], trace.steps, 0)
    attention = model.get_decoder().layers[2].self_attn
    entering = model.get_decoder().layers[2].input_layernorm(states[2][token])
    expected = attention.v_proj(entering).view(-1, attention.head_dim)
    slot = row.stores[2].tokens.tolist().index(token)
    torch.testing.assert_close(row.stores[2].read()[1][0, :, slot], expected, rtol=0, atol=1e-12)


def test_every_step_starts_from_the_whole_context():
    trace = TokenTrace()
    pipe = LazyPipeline(
        tiny_model(), scorer=LastTokenAttention(), schedule=Stages({2: 0.5}), cache=AuxCache(), callbacks=[trace]
    )
    pipe.generate(random_ids(1, 30)[0], max_new_tokens=4, do_sample=False, eos_token_id=-1)
    assert [step[0].rows[0].visible.numel() for step in trace.steps] == [30, 31, 32, 33]
    assert [step[2].rows[0].visible.numel() for step in trace.steps] == [15, 15, 16, 16]


@given(st.integers(2, 60), st.floats(0.05, 1))
def test_the_keep_ratio_is_of_all_context_tokens_rounded_down(length, keep):
    pipe = LazyPipeline(
        tiny_model(), scorer=LastTokenAttention(), schedule=Stages({1: keep}), cache=AuxCache(), protect=Protect()
    )
    stats = pipe.generate(random_ids(1, length)[0], max_new_tokens=1).stats
    assert stats.tokens_per_layer[0][1].computed == max(1, int(keep * length + 1e-9))


def test_a_fraction_of_the_depth_never_means_before_the_first_layer():
    assert Stages({0.1: 0.5}).resolve(4) == [1.0, 0.5, 0.5, 0.5]
