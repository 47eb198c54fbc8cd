"""Tuning on tiny models: what is measured, what is searched, and that a search goes on as if it had not been cut."""

import json
import math
import random
import sys
from pathlib import Path

import optuna
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lazyllm import (
    SCORERS,
    AuxCache,
    ConfigError,
    Constant,
    InputError,
    LateInteraction,
    LazyConfig,
    LazyPipeline,
    PolicyError,
    Random,
    Scorer,
    Stages,
    TwoHop,
    WindowAttention,
)
from lazyllm.cli.main import app
from lazyllm.costs import entering_tokens
from lazyllm.evaluation.fidelity import divergence
from lazyllm.evaluation.quality import Contender, forced_logits, greedy_reply
from lazyllm.files.prompts import NamedPrompt
from lazyllm.policies.base import Phase
from lazyllm.policies.schedules.tuned import Measured, TunedFile
from lazyllm.policies.select import Selector
from lazyllm.tuning import fidelity as fidelity_module
from lazyllm.tuning.fidelity import Fidelity
from lazyllm.tuning.prompts import read_prompts, split
from lazyllm.tuning.space import RULES, Space, ladders, numbers, with_fields
from lazyllm.tuning.study import Outcome, Point, Target, tune
from tests.test_config import REQUIRED
from tests.tiny import word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
TOKENIZER = word_tokenizer(WORDS)
BASE = LazyConfig(scorer=LateInteraction(query=4, pool=3), cache=AuxCache(max_revived=2))
PROMPTS = [
    NamedPrompt(f"p{row}", " ".join(WORDS[(row * 11 + index * (row + 3)) % 60] for index in range(40 + row)))
    for row in range(5)
]
SMALL = {"base": BASE, "new_tokens": 3, "trials": 6}
EASY = Target(speedup=1.01)


def random_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=66, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return random_model()


@pytest.fixture
def measured(monkeypatch) -> list[LazyConfig]:
    """Every configuration that is measured, in order."""
    seen = []
    measure = Fidelity.measure
    monkeypatch.setattr(
        Fidelity, "measure", lambda self, config, references: seen.append(config) or measure(self, config, references)
    )
    return seen


# -- prompts -------------------------------------------------------------------------------------------


def test_a_folder_gives_its_texts_in_order_and_each_once(tmp_path):
    for name, text in {"b.txt": "two", "a.txt": "one\n", "c.txt": "two", "d.md": "none"}.items():
        (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path) == [NamedPrompt("a.txt", "one\n"), NamedPrompt("b.txt", "two")]
    assert read_prompts(tmp_path, chat=True)[1] == NamedPrompt("b.txt", [{"role": "user", "content": "two"}])


def test_lines_give_texts_and_chats(tmp_path):
    chat = [{"role": "user", "content": "two"}]
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "one\u2028", "other": 1}, {"prompt": chat}, {"prompt": "one\u2028"}]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    assert read_prompts(file) == [NamedPrompt("line 1", "one\u2028"), NamedPrompt("line 3", chat)]
    assert read_prompts(file, chat=True)[1].prompt == chat


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("a.txt", b"", ["empty", "a.txt"]),
        ("a.txt", b"\xff", ["0xff at offset 0", "a.txt"]),
        ("a.txt", b"a\0", ["offset 1", "a.txt"]),
        ("a.md", b"text", ["no .txt file"]),
        ("p.jsonl", b"", ["no prompt"]),
        ("p.jsonl", b'{"prompt": "a"}\n{', ["line 2", "not JSON"]),
        ("p.jsonl", b"\xff", ["line 1", "not JSON"]),
        ("p.jsonl", b'{"text": "a"}', ["line 1", 'no field "prompt"']),
        ("p.jsonl", b'["a"]', ["line 1", 'no field "prompt"']),
        ("p.jsonl", b'{"prompt": 3}', ["line 1", 'no field "prompt"']),
        ("p.jsonl", b'{"prompt": " "}', ["line 1", "empty"]),
        ("p.json", b"{}", ["p.json", ".jsonl"]),
        ("none.jsonl", None, ["none.jsonl", "No such file"]),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(tmp_path, name: str, data: bytes | None, parts: list[str]):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    path = tmp_path if name in ("a.txt", "a.md") else tmp_path / name
    with pytest.raises(InputError) as error:
        read_prompts(path)
    for part in parts:
        assert part in str(error.value)


@given(st.integers(2, 30), st.integers(0, 99))
def test_a_third_of_the_prompts_validates_and_both_have_one(count: int, seed: int):
    prompts = [NamedPrompt(str(index), "text") for index in range(count)]
    training, validation = split(prompts, seed)
    assert sorted([*training, *validation], key=lambda named: int(named.name)) == prompts
    assert len(validation) == max(1, round(count / 3))
    assert training
    assert split(prompts, seed) == (training, validation)


def test_which_prompts_validate_is_drawn_by_the_seed():
    assert len({tuple(named.name for named in split(PROMPTS, seed)[1]) for seed in range(9)}) > 2


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_prompts_are_refused(count: int):
    with pytest.raises(InputError, match=f"{count} prompt is too few"):
        split(PROMPTS[:count], 0)


# -- what is measured ------------------------------------------------------------------------------------


def test_the_divergence_is_the_sum_it_is_defined_as():
    dense = torch.tensor([[0.0, 1.0, 2.0], [3.0, -1.0, 0.5]], dtype=torch.float64)
    pruned = torch.tensor([[1.0, 1.0, 0.0], [3.0, -1.0, 0.5]], dtype=torch.float64)
    p, q = ([math.exp(value) for value in row.tolist()] for row in (dense[0], pruned[0]))
    p, q = ([value / sum(values) for value in values] for values in (p, q))
    first = sum(above * math.log(above / below) for above, below in zip(p, q, strict=True))
    assert divergence(dense, pruned) == pytest.approx(first / 2, rel=1e-12)
    assert divergence(dense, dense + 5) == pytest.approx(0, abs=1e-15)
    impossible = torch.tensor([[0.0, 0.0, -math.inf]])
    assert divergence(impossible, torch.zeros(1, 3)) == pytest.approx(math.log(3) - math.log(2))


def test_forced_logits_are_those_of_one_dense_pass_and_the_reply_is_the_models(model):
    pipe = LazyPipeline.from_preset("dense", model, TOKENIZER)
    prompt = PROMPTS[0].prompt
    ids = pipe.encode(prompt).token_ids
    reply, logits = greedy_reply(Contender(pipe, "dense", is_stock=True), prompt, 5)
    assert reply == pipe.generate(prompt, max_new_tokens=5, do_sample=False).token_ids
    whole = model(torch.tensor([[*ids, *reply]])).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(forced_logits(Contender(pipe, "kept"), prompt, reply), whole, rtol=0, atol=1e-12)
    other = [(token + 1) % 60 for token in reply]
    whole = model(torch.tensor([[*ids, *other]])).logits[0, len(ids) - 1 : -1]
    torch.testing.assert_close(forced_logits(Contender(pipe, "kept"), prompt, other), whole, rtol=0, atol=1e-12)


def test_a_reply_ends_with_the_end_token(model, monkeypatch):
    pipe = LazyPipeline.from_preset("dense", model, TOKENIZER)
    contender = Contender(pipe, "dense", is_stock=True)
    reply, _ = greedy_reply(contender, PROMPTS[0].prompt, 8)
    end = reply[2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    shorter, logits = greedy_reply(contender, PROMPTS[0].prompt, 8)
    assert shorter == reply[: reply.index(end) + 1]
    assert logits.shape[0] == len(shorter)


def test_keeping_everything_loses_nothing_and_gains_nothing(model, tmp_path):
    fidelity = Fidelity(model, TOKENIZER, tmp_path, new_tokens=4)
    references = [fidelity.reference(prompt) for prompt in PROMPTS[:2]]
    found = fidelity.measure(LazyConfig(scorer=Random(), schedule=Constant(1.0)), references)
    assert found.divergence == pytest.approx(0, abs=1e-12)
    assert (found.prompts, found.speedup) == (2, 1.0)


def test_what_is_measured_is_the_mean_divergence_and_the_speedup_of_all_prefills(model, tmp_path):
    fidelity = Fidelity(model, TOKENIZER, tmp_path, new_tokens=4)
    config = LazyConfig(**{**dict(BASE), "schedule": Stages({1: 0.5, 2: 0.25})})
    pipe = LazyPipeline.from_config(config, model, TOKENIZER)
    losses, done, dense = [], 0.0, 0.0
    for prompt in PROMPTS[:3]:
        reference = fidelity.reference(prompt)
        losses.append(
            divergence(reference.logits, forced_logits(Contender(pipe, "x"), prompt.prompt, reference.tokens))
        )
        stats = pipe.generate(prompt.prompt, max_new_tokens=1).stats
        done, dense = done + stats.flops, dense + stats.dense_flops
        alone = fidelity.measure(config, [reference])
        assert alone.speedup == pytest.approx(stats.predicted_speedup, rel=1e-12)
        assert alone.divergence == pytest.approx(losses[-1], rel=1e-12)
    found = fidelity.measure(config, [fidelity.reference(prompt) for prompt in PROMPTS[:3]])
    assert found.divergence == pytest.approx(sum(losses) / 3, rel=1e-12)
    assert found.divergence > 0.001
    assert found.speedup == pytest.approx(dense / done, rel=1e-12)


def test_dense_replies_are_computed_once_for_a_model_and_a_length(model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        fidelity_module, "greedy_reply", lambda *values: asked.append(values[2]) or greedy_reply(*values)
    )

    def reference(network, new_tokens: int):
        return Fidelity(network, TOKENIZER, tmp_path, new_tokens=new_tokens).reference(PROMPTS[0])

    first, again = reference(model, 3), reference(model, 3)
    assert asked == [3]
    assert first.tokens == again.tokens
    assert torch.equal(first.logits, again.logits)
    assert again.logits.dtype == torch.float64
    assert len(reference(model, 4).tokens) == 4
    reference(random_model(1), 3)
    assert asked == [3, 4, 3]


def test_a_dense_reply_that_was_cut_off_on_disk_is_computed_anew(model, tmp_path):
    fidelity = Fidelity(model, TOKENIZER, tmp_path, new_tokens=3)
    first = fidelity.reference(PROMPTS[0])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for part in (whole[:40], b""):
        file.write_bytes(part)
        assert torch.equal(fidelity.reference(PROMPTS[0]).logits, first.logits)
        assert file.read_bytes() == whole


def test_a_prompt_that_is_too_long_is_refused_by_name(model, tmp_path):
    fidelity = Fidelity(model, TOKENIZER, tmp_path, new_tokens=16)
    with pytest.raises(InputError, match=r"'long' has 241 tokens, with a reply of 16 more than the 256 positions"):
        fidelity.reference(NamedPrompt("long", "w1 " * 241))
    fidelity.token_ids(NamedPrompt("fits", "w1 " * 240))


def test_a_model_that_computes_no_numbers_is_refused(tmp_path):
    broken = random_model()
    broken.lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="'p0' are not all finite"):
        Fidelity(broken, TOKENIZER, tmp_path, new_tokens=2).reference(PROMPTS[0])


# -- what is searched --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorers_numbers_are_tried_around_what_they_are_within_their_bounds(name: str):
    scorer = SCORERS[name](**REQUIRED.get(name, {}))
    given = numbers(scorer)
    found = ladders(scorer)
    assert set(found) <= set(given)
    for path, ladder in found.items():
        assert given[path] in ladder
        assert len(ladder) == len(set(ladder)) > 1
        for value in ladder:
            changed = with_fields(scorer, {path: value})
            assert numbers(changed)[path] == value
            assert {**numbers(changed), path: given[path]} == given


def test_numbers_become_amounts_that_fields_take():
    assert ladders(LateInteraction()) == {
        "pool": [(9, 17, 33), (17, 33, 65), (33, 65, 129), (67, 131, 259), (133, 261, 517)],
        "temperature": [0.25, 0.5, 1.0, 2.0, 4.0],
    }
    assert ladders(WindowAttention(window=1, pool=1)) == {"window": [1, 2, 4], "pool": [1, 3, 5]}
    assert ladders(LateInteraction(query=8, pool=3, temperature=0.123456))["temperature"] == [
        0.03086, 0.06173, 0.123456, 0.2469, 0.4938,
    ]  # fmt: skip
    assert "query" not in ladders(LateInteraction(query=8))
    assert ladders(Random(seed=7)) == {}


def test_numbers_of_scorers_inside_scorers_are_tried_too():
    scorer = TwoHop(scorer=LateInteraction(pool=3), tokens=8, weight=0.0)
    assert set(ladders(scorer)) == {"scorer.pool", "scorer.temperature", "tokens"}
    changed = with_fields(scorer, {"scorer.temperature": 0.5, "tokens": 16})
    assert changed == TwoHop(scorer=LateInteraction(pool=3, temperature=0.5), tokens=16, weight=0.0)
    with pytest.raises(ConfigError, match="tokens"):
        with_fields(scorer, {"tokens": 0})


def parameters(space: Space) -> st.SearchStrategy[dict]:
    """Anything the search may draw."""

    def one(known):
        if isinstance(known, CategoricalDistribution):
            return st.sampled_from(known.choices)
        values = st.floats if isinstance(known, FloatDistribution) else st.integers
        return values(known.low, known.high)

    return st.fixed_dictionaries({name: one(known) for name, known in space.distributions.items()})


@pytest.mark.parametrize("scorer", [LateInteraction(), WindowAttention(), Random()], ids=str)
@given(data=st.data(), layers=st.integers(2, 40))
def test_whatever_is_drawn_is_a_configuration_of_one_or_two_falling_cuts(scorer: Scorer, data, layers: int):
    space = Space(LazyConfig(scorer=scorer, cache=AuxCache(decode="reuse")), layers)
    drawn = data.draw(parameters(space))
    config = space.config(drawn)
    selector = Selector(config.scorer, config.schedule, config.protect, layers)
    assert 1 <= len(selector.cut_layers) <= drawn["cuts"]
    assert min(selector.cut_layers) == drawn["place"] - 1 + scorer.needs_attention
    assert max(selector.cut_layers) < layers
    cuts = selector.cuts(Phase(True, 1000))
    assert all(keep.adapts == (drawn["rule"] == "share") for keep in cuts.values())
    assert type(config.scorer) is type(scorer)
    assert config.cache == AuxCache(decode="reuse")
    assert LazyConfig.from_text(config.to_yaml()) == config
    for layer in cuts:
        assert f"at {layer}" in space.summary(drawn)
    if drawn["rule"] == "ratio":
        ratios = config.schedule.resolve(layers)
        assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("layers", [2, 3, 30])
@pytest.mark.parametrize("rules", [RULES, ("share",), ("ratio",)])
def test_the_first_trials_lie_in_the_space_and_try_each_rule(layers: int, rules: tuple[str, ...]):
    for scorer in (LateInteraction(), WindowAttention(), TwoHop(scorer=LateInteraction())):
        space = Space(LazyConfig(scorer=scorer), layers, rules)
        for start in space.starts:
            create_trial(params=start, distributions=space.distributions, values=[0, 0])
            assert space.config(start).scorer == scorer
        assert {start["rule"] for start in space.starts} == set(rules)
        assert set(space.distributions["rule"].choices) == set(rules)
        assert ("power" in space.distributions) == ("share" in rules)
        assert ("ratio" in space.distributions) == ("ratio" in rules)


@pytest.mark.parametrize(
    ("config", "layers", "rules", "part"),
    [
        (LazyConfig(), 1, RULES, "a model of 1 layer has none"),
        (LazyConfig(cache="DenseCache"), 4, RULES, "nothing is pruned"),
        (LazyConfig(), 4, ("ratios",), "Did you mean 'ratio'"),
    ],
)
def test_a_space_that_cannot_be_is_refused(config: LazyConfig, layers: int, rules, part: str):
    with pytest.raises(InputError) as error:
        Space(config, layers, rules)
    assert part in str(error.value)


# -- targets -------------------------------------------------------------------------------------------------


def point(number: int, divergence: float, speedup: float) -> Point:
    measured = Measured(prompts=1, divergence=divergence, speedup=speedup)
    return Point(number, "", LazyConfig(), measured, measured)


FRONT = [point(0, 0.01, 1.5), point(1, 0.05, 2.5), point(2, 0.2, 4.0)]


@pytest.mark.parametrize(
    ("target", "chosen", "nearest"),
    [
        (Target(speedup=2.0), 1, 2),
        (Target(speedup=2.5), 1, 2),
        (Target(speedup=4.1), None, 2),
        (Target(max_loss=0.1), 1, 0),
        (Target(max_loss=0.2), 2, 0),
        (Target(max_loss=0.001), None, 0),
    ],
)
def test_a_target_takes_the_best_other_value_of_what_meets_it(target: Target, chosen: int | None, nearest: int):
    found = target.choose(FRONT)
    assert (found.number if found else None) == chosen
    assert target.nearest(FRONT).number == nearest


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({}, "one target"),
        ({"speedup": 2.0, "max_loss": 0.1}, "one target"),
        ({"speedup": 1.0}, "above 1, not 1.0"),
        ({"speedup": math.nan}, "above 1, not nan"),
        ({"speedup": math.inf}, "not inf"),
        ({"max_loss": 0.0}, "above 0"),
        ({"max_loss": -1.0}, "not -1.0"),
    ],
)
def test_a_target_that_is_none_is_refused(fields, part: str):
    with pytest.raises(InputError, match=part):
        Target(**fields)


# -- the search ------------------------------------------------------------------------------------------------


def study_in(folder: Path) -> optuna.Study:
    file = optuna.storages.journal.JournalFileBackend(str(folder / "study.log"))
    return optuna.load_study(study_name="lazyllm tune", storage=optuna.storages.JournalStorage(file))


def found(outcome: Outcome):
    """What must not depend on where and in how many pieces a search ran."""
    return outcome.trials, outcome.front, outcome.chosen


def test_a_search_gives_the_same_for_a_seed_and_another_for_another(model, tmp_path, measured):
    outcomes, configs = [], []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        measured.clear()
        outcomes.append(tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / name, **SMALL, seed=seed))
        configs.append(measured[:6])
    first, again, other = outcomes
    assert found(first) == found(again)
    assert configs[0] == configs[1]
    assert first.trials == 6
    assert first.front != other.front
    assert configs[0][:4] == configs[2][:4]  # these are given, the others drawn
    assert not any(config in configs[2] for config in configs[0][4:])
    assert configs[0][4] != configs[0][5]


def test_the_front_is_what_no_trial_beats(model, tmp_path):
    outcome = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)
    values = [tuple(trial.values) for trial in study_in(tmp_path).trials]
    best = {
        (loss, speed)
        for loss, speed in values
        if not any(a <= loss and b >= speed and (a, b) != (loss, speed) for a, b in values)
    }
    assert [(one.training.divergence, one.training.speedup) for one in outcome.front] == sorted(best)
    assert {one.training.prompts for one in outcome.front} == {3}
    assert {one.validation.prompts for one in outcome.front} == {2}
    fidelity = Fidelity(model, TOKENIZER, tmp_path / "references", new_tokens=3)
    training, validation = ([fidelity.reference(prompt) for prompt in prompts] for prompts in split(PROMPTS, 0))
    for one in outcome.front:
        assert fidelity.measure(one.config, training) == one.training
        assert fidelity.measure(one.config, validation) == one.validation


def test_of_trials_that_do_the_same_the_front_has_the_first(model, tmp_path, monkeypatch):
    same = {"divergence": 1.0, "speedup": 2.0}
    monkeypatch.setattr(Fidelity, "measure", lambda *values: made_up(*values).model_copy(update=same))
    outcome = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)
    assert [(one.number, one.training.speedup) for one in outcome.front] == [(0, 2.0)]


def test_more_trials_go_on_where_fewer_stopped(model, tmp_path, measured):
    whole = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "whole", **SMALL)
    configs = list(measured)
    measured.clear()
    tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "parts", **{**SMALL, "trials": 5})
    assert measured[:5] == configs[:5]
    measured.clear()
    parts = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "parts", **SMALL)
    assert found(parts) == found(whole)
    assert measured[0] == configs[5]
    measured.clear()
    assert found(tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "parts", **SMALL)) == found(whole)
    assert measured == []  # nothing is done twice, validation included


def made_up(self, config: LazyConfig, references) -> Measured:
    """What a configuration might do, at once: so that a search can be long enough to learn from its trials."""
    entering = entering_tokens(config, 4, 1000)
    luck = random.Random(config.to_json()).random()
    return Measured(
        prompts=len(references), divergence=1e-3 * (4000 - sum(entering)) * luck, speedup=4000 / sum(entering)
    )


@pytest.mark.parametrize("cut", [0, 2, 4, 5, 10, 13, 15, 16])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(model, tmp_path, monkeypatch, cut: int):
    count, kill_at = 0, math.inf

    def measure(self, config, references):
        nonlocal count
        count += 1
        if count > kill_at:
            raise KeyboardInterrupt
        return made_up(self, config, references)

    monkeypatch.setattr(Fidelity, "measure", measure)
    long = {**SMALL, "trials": 16}
    whole = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "whole", **long)
    count, kill_at = 0, cut
    with pytest.raises(KeyboardInterrupt):
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "cut", **long)
    assert not (tmp_path / "cut" / "tuned.json").exists()
    kill_at = math.inf
    parts = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "cut", **long)
    assert [unnumbered(one) for one in parts.front] == [unnumbered(one) for one in whole.front]
    assert parts.trials == whole.trials
    assert unnumbered(parts.chosen) == unnumbered(whole.chosen)


def test_a_search_learns_from_its_trials(model, tmp_path, monkeypatch):
    monkeypatch.setattr(Fidelity, "measure", made_up)
    drawn = {}
    for name in ("learnt", "other"):
        if name == "other":  # the same draws but for what is told of the trials
            monkeypatch.setattr(
                Fidelity,
                "measure",
                lambda *values: made_up(*values).model_copy(update={"divergence": 1.0, "speedup": 2.0}),
            )
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / name, **{**SMALL, "trials": 16})
        drawn[name] = [trial.params for trial in study_in(tmp_path / name).trials]
    assert drawn["learnt"][:10] == drawn["other"][:10]
    assert drawn["learnt"][10:] != drawn["other"][10:]


def unnumbered(one: Point) -> tuple:
    """A point without the number of its trial: a trial that was cut off keeps its own."""
    return one.config, one.training, one.validation


def test_a_study_whose_last_line_was_cut_off_goes_on(model, tmp_path):
    whole = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)
    file = tmp_path / "study.log"
    file.write_bytes(file.read_bytes() + b'{"op_code": 4, "wor')
    assert found(tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)) == found(whole)
    assert found(tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **{**SMALL, "trials": 7}))[0] == 7


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"new_tokens": 4}, "number of new tokens"),
        ({"seed": 1}, "seed"),
        ({"base": LazyConfig(scorer=Random(), cache=AuxCache(max_revived=2))}, "scorer, cache or protected tokens"),
        ({"base": LazyConfig(scorer=BASE.scorer, cache="DropCache")}, "scorer, cache or protected tokens"),
        ({"rules": ("ratio",)}, "search space"),
    ],
)
def test_a_study_of_something_else_is_refused(model, tmp_path, change, part: str):
    tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **{**SMALL, "trials": 1})
    before = (tmp_path / "study.log").read_bytes()
    with pytest.raises(InputError, match="of something else: it differs in .*" + part):
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **{**SMALL, **change})
    assert (tmp_path / "study.log").read_bytes() == before


def test_a_study_of_another_model_or_other_prompts_is_refused(model, tmp_path):
    tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **{**SMALL, "trials": 1})
    with pytest.raises(InputError, match="differs in model;"):
        tune(random_model(1), TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)
    with pytest.raises(InputError, match="differs in prompts;"):
        tune(model, TOKENIZER, PROMPTS[:4], EASY, out=tmp_path, **SMALL)
    assert tune(model, TOKENIZER, PROMPTS, Target(max_loss=9.0), out=tmp_path, **{**SMALL, "trials": 2}).trials == 2


@pytest.mark.parametrize("data", [b"no study", b"no study\n", b'{"a": 1}\n', b"[]\n", b'{"op_code": 0}\n{"b"\n{}\n'])
def test_a_file_that_is_no_study_is_refused_and_left_alone(model, tmp_path, data: bytes):
    (tmp_path / "study.log").write_bytes(data)
    with pytest.raises(InputError, match=r"study\.log"):
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL)
    assert (tmp_path / "study.log").read_bytes() == data


def test_a_folder_that_cannot_be_made_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot use the folder"):
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "file" / "deeper", **SMALL)


def test_what_is_written_is_a_configuration_of_the_chosen_point(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = tune(model, TOKENIZER, PROMPTS, EASY, out="here", **SMALL)
    chosen = outcome.chosen
    assert chosen is not None
    assert outcome.files == (Path("here/tuned.json"), Path("here/tuned.yaml"))
    file = TunedFile.load("here/tuned.json")
    assert (file.schedule, file.scorer) == (chosen.config.schedule, chosen.config.scorer)
    assert (file.training, file.validation) == (chosen.training, chosen.validation)
    assert (file.target, file.new_tokens) == ({"speedup": 1.01}, 3)
    monkeypatch.chdir("/")  # the path in it is absolute
    path = tmp_path / "here" / "tuned.yaml"
    pipe = LazyPipeline.from_preset(path, model, TOKENIZER)
    expected = LazyPipeline.from_config(chosen.config, model, TOKENIZER)
    replies = [run.generate(PROMPTS[0].prompt, max_new_tokens=6, do_sample=False) for run in (pipe, expected)]
    assert replies[0].token_ids == replies[1].token_ids
    assert replies[0].stats.tokens_per_layer == replies[1].stats.tokens_per_layer
    assert pipe.config.cache == BASE.cache
    with pytest.raises(ConfigError, match="fingerprint"):
        LazyPipeline.from_preset(path, random_model(1), TOKENIZER)


def test_where_nothing_meets_the_target_nothing_is_written(model, tmp_path):
    outcome = tune(model, TOKENIZER, PROMPTS, Target(speedup=500), out=tmp_path, **SMALL)
    assert (outcome.chosen, outcome.files, outcome.validates) == (None, (), False)
    assert outcome.nearest == outcome.front[-1]
    assert not (tmp_path / "tuned.json").exists()
    easier = tune(model, TOKENIZER, PROMPTS, Target(speedup=outcome.nearest.training.speedup), out=tmp_path, **SMALL)
    assert easier.chosen == outcome.nearest


def test_progress_is_told_from_start_to_end(model, tmp_path):
    told = []
    tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **SMALL, on_progress=lambda *step: told.append(step))
    assert told[:6] == [("dense replies", done, 5) for done in range(6)]
    assert told[6:13] == [("trials", done, 6) for done in range(7)]
    rest = told[13:]
    assert rest == [("validation", done, len(rest) - 1) for done in range(len(rest))]


class Signed(Scorer):
    """Scores of both signs."""

    def score(self, context) -> torch.Tensor:
        return context.positions.double() - 20


def test_shares_of_signed_scores_are_refused_and_ratios_are_not(model, tmp_path):
    base = LazyConfig(scorer=Signed())
    with pytest.raises(PolicyError, match="fixed keep ratio"):
        tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "a", **{**SMALL, "base": base})
    outcome = tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path / "b", **{**SMALL, "base": base}, rules=("ratio",))
    assert outcome.trials == 6


def test_optuna_logs_as_it_did_before(model, tmp_path, capfd):
    before = optuna.logging.get_verbosity()
    tune(model, TOKENIZER, PROMPTS, EASY, out=tmp_path, **{**SMALL, "trials": 5})
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr().err == ""


# -- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> tuple[Path, Path]:
    """The model and the prompts as one would find them on disk."""
    path = tmp_path_factory.mktemp("disk")
    model.save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    (path / "prompts").mkdir()
    for prompt in PROMPTS:
        (path / "prompts" / f"{prompt.name}.txt").write_text(prompt.prompt)
    return path / "model", path / "prompts"


@pytest.fixture
def lazyllm_tune(folders, monkeypatch, tmp_path):
    """Runs `lazyllm tune` on the tiny model, with a few trials."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    model, prompts = folders

    def run(*arguments: object):
        small = ["--model", model, "--prompts", prompts, "--out", tmp_path / "out", "--trials", 6, "--new-tokens", 3]
        scorer = ["--preset", "paper", "--scorer", "LateInteraction(query=4, pool=3)"]
        return CliRunner().invoke(app, ["tune", *map(str, [*small, *scorer, *arguments])])

    return run


def test_the_command_prints_the_front_and_writes_the_files(lazyllm_tune, folders, tmp_path):
    result = lazyllm_tune("--speedup", "1.05")
    assert result.exit_code == 0, result.stderr
    loaded = LazyPipeline.from_pretrained(folders[0], preset="dense")
    base = LazyConfig(**{**dict(LazyConfig.preset("paper")), "scorer": "LateInteraction(query=4, pool=3)"})
    prompts = [NamedPrompt(prompt.name, prompt.prompt) for prompt in PROMPTS]
    outcome = tune(
        loaded.model, loaded.tokenizer, prompts, Target(1.05), out=tmp_path / "again", **{**SMALL, "base": base}
    )
    for one in outcome.front:
        (line,) = [row for row in result.stdout.splitlines() if one.summary in row]
        cells = line.split(one.summary)[0].split()
        assert cells == [
            ("*" if one == outcome.chosen else "") + str(one.number),
            f"{one.training.speedup:.2f}x",
            f"{one.validation.speedup:.2f}x",
            f"{one.training.divergence:.4f}",
            f"{one.validation.divergence:.4f}",
        ]
    assert "front of 6 trials, chosen on 3 prompts, validated on 2" in result.stdout
    assert f"chosen for a speedup of 1.05: trial {outcome.chosen.number}" in result.stdout
    assert ("warning" in result.stderr) == (not outcome.validates)
    for kind in ("dense replies", "trials", "validation"):
        assert kind in result.stderr
    assert TunedFile.load(tmp_path / "out" / "tuned.json").schedule == outcome.chosen.config.schedule


def test_the_command_warns_where_the_validation_misses_the_target(lazyllm_tune, tmp_path, monkeypatch):
    measure = Fidelity.measure

    def worse_on_validation(self, config, references):
        got = measure(self, config, references)
        return got if len(references) == 3 else Measured(prompts=2, divergence=got.divergence, speedup=1.0)

    monkeypatch.setattr(Fidelity, "measure", worse_on_validation)
    result = lazyllm_tune("--speedup", "1.05")
    assert result.exit_code == 0
    assert "on the validation prompts: 1.00x" in result.stdout
    assert "warning: on the validation prompts the chosen trial misses a speedup of 1.05" in result.stderr
    assert TunedFile.load(tmp_path / "out" / "tuned.json").validation.speedup == 1.0
    easy = lazyllm_tune("--max-loss", "1000")
    assert (easy.exit_code, "warning" in easy.stderr) == (0, False)


def test_the_command_says_what_is_nearest_where_nothing_meets_the_target(lazyllm_tune, tmp_path):
    result = lazyllm_tune("--speedup", "500")
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert line.startswith("lazyllm: none of 6 trials reaches a speedup of 500, so nothing was written")
    assert not (tmp_path / "out" / "tuned.json").exists()
    nearest = line.split("--speedup ")[1].split()[0]
    again = lazyllm_tune("--speedup", nearest)
    assert again.exit_code == 0, again.stderr
    assert f"trial {line.split('nearest is trial ')[1].split(',')[0]}," in again.stdout
    missed = lazyllm_tune("--max-loss", "1e-12")
    assert missed.exit_code == 2
    least = missed.stderr.splitlines()[-1].split("--max-loss ")[1].split()[0]
    assert lazyllm_tune("--max-loss", least).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["one target"]),
        (["--speedup", "2", "--max-loss", "1"], ["one target"]),
        (["--speedup", "0.5"], ["above 1, not 0.5"]),
        (["--speedup", "2", "--scorer", "LateInteractio"], ["Did you mean 'LateInteraction'?"]),
        (["--speedup", "2", "--preset", "papr"], ["Did you mean 'paper'?"]),
        (["--speedup", "2", "--cache", "DenseCache"], ["nothing is pruned"]),
        (["--speedup", "2", "--rules", "shares"], ["Did you mean 'share'?"]),
        (["--speedup", "2", "--prompts", "none"], ["'none'"]),
        (["--speedup", "2", "--model", "NOTHING"], ["nothing-here"]),
        (["--speedup", "2", "--out", "OCCUPIED"], ["--out is a folder"]),
    ],
    ids=lambda value: " ".join(value[-2:]),
)
def test_the_command_refuses_in_one_line(lazyllm_tune, tmp_path, arguments: list[str], parts: list[str]):
    paths = {"OCCUPIED": tmp_path / "file", "NOTHING": tmp_path / "nothing-here"}
    paths["OCCUPIED"].write_text("")
    result = lazyllm_tune(*[paths.get(argument, argument) for argument in arguments])
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("lazyllm: ")
    for part in parts:
        assert part in line


def test_one_prompt_is_refused_before_the_model_is_loaded(lazyllm_tune, tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "a.txt").write_text("w1 w2")
    result = lazyllm_tune("--speedup", 2, "--prompts", tmp_path / "prompts", "--model", tmp_path / "none")
    assert result.exit_code == 2
    assert "1 prompt is too few" in result.stderr


def test_without_optuna_the_command_says_what_to_install(lazyllm_tune, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    result = lazyllm_tune("--speedup", 2)
    assert result.exit_code == 2
    assert result.stderr.strip().endswith('pip install "lazyllm-torch[tune]"')
