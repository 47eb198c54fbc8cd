"""The table that judges scorers by the evidence they keep."""

import random

import pytest
import torch

from lazyllm import SCORERS, ConfigError, LazyPipeline, Oracle, Protect, Random, Stages, TokenTrace
from lazyllm.evaluation.plots import plot_recall
from lazyllm.evaluation.ranking import Ranking
from lazyllm.evaluation.scorers import Kept, _of_the_oracles, every_scorer, judge_scorers, scorer_sections
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


def test_one_pass_ranks_as_every_pruned_run_would(found):
    """Each scorer once more, pruning at one layer and one keep ratio at a time."""
    for name, scorer in every_scorer("w1 w2").items():
        for layer, keep in [(0, 0.25), (2, 0.25), (2, 0.5)]:
            if layer == 0 and scorer.needs_attention:
                continue
            schedule = Stages({layer: keep})
            trace = TokenTrace()
            pipe = LazyPipeline(
                tiny_model(), word_tokenizer(WORDS), scorer=scorer, schedule=schedule, cache="DropCache",
                protect=Protect(), callbacks=[trace],
            )  # fmt: skip
            recalls = []
            for seed in (0, 1):
                pipe.generate(item(seed).prompt, max_new_tokens=1, do_sample=False)
                (row,) = trace.steps[-1][layer].rows
                recalls.append(int((row.visible >= 20).sum()) / 20)
            assert recall(found, name, layer, keep) == pytest.approx(sum(recalls) / 2), (name, layer, keep)


def test_the_oracle_keeps_its_own_tokens_and_chance_keeps_the_share(found):
    assert {one.oracle for one in found if one.scorer == "Oracle"} == {1.0}
    assert all(0 <= one.oracle <= 1 for one in found)
    uniform = [one.oracle for one in found if (one.scorer, one.keep) == ("Uniform", 0.5)]
    assert sum(uniform) / len(uniform) == pytest.approx(0.5, abs=0.15)


def test_tokens_that_either_protects_do_not_count():
    mine = Ranking(torch.tensor([0.0, 1, 2, 3, 4]), torch.tensor([False, False, False, True, True]))
    oracle = Ranking(torch.tensor([4.0, 1, 0, 3, 2]), torch.tensor([False, False, False, False, True]))
    assert mine.kept(0.6).tolist() == [False, False, True, True, True]
    assert oracle.kept(0.6).tolist() == [True, False, False, True, True]
    assert _of_the_oracles(mine, oracle, 0.6) == 0, "of the first token alone"
    assert _of_the_oracles(mine, oracle, 0.2) is None


def test_scorers_of_ones_own_are_judged_without_any_evidence():
    bare = {"made": [Item("made", item().prompt, "", new_tokens=3)]}
    mine = {"mine": Random(seed=3)}
    kept = list(judge_scorers(tiny_model(), word_tokenizer(WORDS), bare, layers=[0, 3], keeps=KEEPS, scorers=mine))
    assert {one.scorer for one in kept} == {"mine", "Oracle"}
    assert {one.recall for one in kept} == {None}
    assert all(one.oracle is not None for one in kept)
    assert [section.title for section in scorer_sections(kept, "")] == [
        "Of the oracle's tokens kept, pruned before layer 0",
        "Of the oracle's tokens kept, pruned before layer 3",
    ]


def test_the_curves_are_drawn(found, tmp_path):
    assert plot_recall(found, tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_show_every_task_and_what_is_missing(found):
    first, second, third, _ = scorer_sections(found, "as measured")
    assert third.title == "Of the oracle's tokens kept, pruned before layer 0"
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


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        list(judge_scorers(tiny_model(), word_tokenizer(WORDS), {"made": [item()]}, layers=[9], keeps=[0.5]))
