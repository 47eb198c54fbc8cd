"""Every scorer with every schedule and every cache: what holds whatever is combined."""

from typing import Any

import pytest
import torch

from lazyllm import CACHES, SCHEDULES, SCORERS, LazyCache, LazyPipeline, Protect, Stages, TokenTrace, preset_names
from lazyllm.config import LazyConfig
from tests.test_config import REQUIRED
from tests.test_tuned import tuned_file
from tests.tiny import LAYERS, random_ids, tiny_model, word_tokenizer

IDS = random_ids(1, 40)[0]
PROTECT = Protect(sinks=2, recent=3, spans=((10, 12),))
SAFE = {0, 1, 10, 11, 37, 38, 39}
GREEDY = {"do_sample": False, "eos_token_id": -1}
PAIRS = [
    *((scorer, "Stages", cache) for scorer in SCORERS for cache in CACHES),
    *((scorer, schedule, "AuxCache") for scorer in SCORERS for schedule in SCHEDULES),
    *(("LastTokenAttention", schedule, cache) for schedule in SCHEDULES for cache in CACHES),
]


def built(registry, name: str, folder) -> Any:
    fields = {"Stages": {"stages": {1: 0.6, 3: 0.4}}}.get(name) or REQUIRED.get(name, {})
    if name == "Tuned":
        fields = {"path": str(tuned_file(schedule=Stages({1: 0.6, 3: 0.3})).save(folder / "tuned.json"))}
    return registry.build({"name": name, **fields})


def run(pipe: LazyPipeline) -> tuple[TokenTrace, list[int], LazyCache]:
    trace, cache = TokenTrace(), pipe.new_cache()
    traced = LazyPipeline.from_config(pipe.config, pipe.model, callbacks=[trace])
    result = traced.generate(IDS, max_new_tokens=4, past_key_values=cache, **GREEDY)
    return trace, result.token_ids, cache


@pytest.mark.parametrize(("scorer", "schedule", "cache"), sorted(set(PAIRS)))
def test_any_scorer_schedule_and_cache_keep_the_common_rules(scorer: str, schedule: str, cache: str, tmp_path):
    axes = (SCORERS, scorer), (SCHEDULES, schedule), (CACHES, cache)
    parts = [built(registry, name, tmp_path) for registry, name in axes]
    pipe = LazyPipeline(tiny_model(), scorer=parts[0], schedule=parts[1], cache=parts[2], protect=PROTECT)
    trace, reply, held = run(pipe)
    again, same, _ = run(pipe)
    assert reply == same
    assert len(reply) == 4
    for step, repeated in zip(trace.steps, again.steps, strict=True):
        before = None
        for event, other in zip(step, repeated, strict=True):
            row = event.rows[0]
            assert torch.equal(row.visible, other.rows[0].visible)
            assert before is None or set(row.visible.tolist()) <= before
            before = set(row.visible.tolist())
            if event.is_prefill:
                assert before >= SAFE
            assert set(row.computed.tolist()) <= before
    row = held.rows[0]
    assert row.ledger.at_depth == torch.bincount(row.ledger.depth, minlength=LAYERS + 1).tolist()
    computed = sum(event.rows[0].computed.numel() for step in trace.steps for event in step)
    assert computed == int(row.ledger.depth.sum()) + row.retreated
    held.crop(-2)
    held.reorder_cache(torch.tensor([0]))
    assert held.columns == 40 + 4 - 1 - 2


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_answers_a_chat_and_a_batch(name: str):
    words = ["alpha", "beta", "gamma", "?", "what"]
    pipe = LazyPipeline.from_preset(name, tiny_model(), word_tokenizer(words))
    prompt = "alpha beta gamma beta " * 30 + "what alpha ?"
    single = pipe.generate([{"role": "user", "content": prompt}], max_new_tokens=3, **GREEDY)
    batch = pipe.generate([prompt, "alpha beta"], max_new_tokens=3, **GREEDY)
    assert len(single.token_ids) == len(batch[0].token_ids) == len(batch[1].token_ids) == 3
    assert LazyConfig.from_text(pipe.config.to_yaml()) == pipe.config
