"""The table that judges scorers by the evidence they keep."""

import random

import pytest

from lazyllm import SCORERS, ConfigError, InputError, Oracle
from lazyllm.evaluation.scorers import Kept, every_scorer, judge_scorers, scorer_sections
from lazyllm.evaluation.tasks import Item
from tests.tiny import tiny_model, word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
KEEPS = (0.25, 0.5)


def item(seed: int = 0) -> Item:
    """40 words, the last 20 of them evidence."""
    spread = random.Random(seed).sample(WORDS, k=40)
    return Item("made", " ".join(spread), "w1 w2", evidence=(" ".join(spread[20:]),))


@pytest.fixture(scope="module")
def found() -> list[Kept]:
    tasks = {"made": [item(0), item(1)], "other": [item(2)]}
    return list(judge_scorers(tiny_model(), word_tokenizer(WORDS), tasks, layers=[0, 2], keeps=KEEPS))


def recall(found: list[Kept], scorer: str, layer: int, keep: float, task: str = "made") -> float:
    (kept,) = [one for one in found if (one.task, one.scorer, one.layer, one.keep) == (task, scorer, layer, keep)]
    return kept.recall


def test_every_scorer_is_judged_where_it_can_prune(found):
    for name, scorer in every_scorer("w1").items():
        for layer in (0, 2):
            judged = [one for one in found if (one.scorer, one.layer) == (name, layer)]
            assert len(judged) == (0 if layer == 0 and scorer.needs_attention else 4)
    assert {one.scorer for one in found} == set(SCORERS)
    assert {(one.task, one.items) for one in found} == {("made", 2), ("other", 1)}
    assert all(0 <= one.recall <= 1 for one in found)


def test_recall_is_the_share_of_the_evidence_that_the_scorer_keeps(found):
    for layer in (0, 2):
        assert recall(found, "SinkRecent", layer, 0.25) == 6 / 20, "four sinks and the last six of ten tokens"
        assert recall(found, "SinkRecent", layer, 0.5) == 16 / 20
        assert recall(found, "Uniform", layer, 0.5) == pytest.approx(0.5, abs=0.05)


def test_the_oracle_knows_the_items_own_answer(monkeypatch):
    asked = []
    monkeypatch.setattr(Oracle, "score", lambda self, context: asked.append(self.answer) or context.tokens.double())
    tasks = {"made": [item(0), Item("made", item(1).prompt, "w9 w8", evidence=item(1).evidence)]}
    list(judge_scorers(tiny_model(), word_tokenizer(WORDS), tasks, layers=[2], keeps=[0.5]))
    assert asked == ["w1 w2", "w9 w8"]


def test_the_tables_show_every_task_and_what_is_missing(found):
    first, second = scorer_sections(found, "as measured")
    assert first.columns == second.columns == ["scorer", "made, 25% / 50%", "other, 25% / 50%"]
    assert (first.title, first.conditions) == ("Evidence kept, pruned before layer 0", "as measured")
    rows = {row[0].strip("*`"): row[1:] for row in second.rows}
    assert set(rows) == set(SCORERS)
    assert rows["SinkRecent"][0] == "0.30 / 0.80"
    assert rows["Oracle"][0].startswith("**")
    assert "WindowAttention" not in {row[0].strip("*`") for row in first.rows}
    partly = [one for one in found if (one.task, one.scorer) != ("other", "Random")]
    rows = {row[0].strip("*`"): row[1:] for row in scorer_sections(partly, "")[1].rows}
    assert rows["Random"][1] == "- / -"
    assert "| `Random` |" in scorer_sections(partly, "")[1].markdown()


def test_items_without_evidence_and_layers_that_are_not_there_are_refused():
    bare = {"made": [Item("made", "w1 w2 w3 w4", "w1")]}
    tokenizer = word_tokenizer(WORDS)
    with pytest.raises(InputError, match="names no evidence"):
        list(judge_scorers(tiny_model(), tokenizer, bare, layers=[2], keeps=[0.5]))
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        list(judge_scorers(tiny_model(), tokenizer, {"made": [item()]}, layers=[9], keeps=[0.5]))
