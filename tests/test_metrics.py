"""Metrics give what their definitions say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import InputError
from lazyllm.evaluation.metrics import METRICS, words
from lazyllm.evaluation.tasks import Item

texts = st.lists(st.sampled_from(["red", "blue", "the", "42", "7", "Green!"]), max_size=8).map(" ".join)
CLASSES = ("city", "city hall", "river", "hill")


def score(name: str, reply: str, *answers: str, **options) -> float:
    return METRICS[name].score(reply, answers, **options)


@pytest.mark.parametrize(
    ("name", "reply", "answers", "expected"),
    [
        ("contains-any", "It was NEW YORK-city.", ("Boston", "New York-City"), 1),
        ("contains-any", "New Jersey", ("New York",), 0),
        ("contains-all", "they are 123456 and 7", ("123456", "654321"), 0.5),
        ("contains-all", "1234567", ("123456",), 0),
        ("contains-all", "VAR-A, VAR-B", ("VAR-A", "VAR-B"), 1),
        ("f1", "The red house", ("a red house",), 1),
        ("f1", "red", ("red house",), 2 / 3),
        ("f1", "red red", ("red house", "red"), 2 / 3),
        ("f1", "blue", ("red",), 0),
        ("first-line-f1", "\nred\nblue green", ("red",), 1),
        ("rouge-l", "a b c d", ("a c d",), 6 / 7),
        ("rouge-l", "d c b a", ("a b c d",), 1 / 4),
        ("rouge-l", "我们爱", ("我爱",), 4 / 5),
        ("retrieval", "Paragraph 5 or Paragraph 6", ("Paragraph 5",), 1 / 2),
        ("retrieval", "Paragraph 15", ("Paragraph 5",), 0),
        ("count", "There are 17, no, 18", ("18",), 1 / 2),
        ("count", "none", ("18",), 0),
        ("code-similarity", "```python\n# then\nreturn x\nmore", ("return x",), 1),
        ("code-similarity", "abcd", ("bcde",), 0.75),
        ("code-similarity", "", ("bcde",), 0),
    ],
)
def test_a_metric_gives_what_its_definition_says(name: str, reply: str, answers, expected: float):
    assert score(name, reply, *answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reply", "answer", "expected"),
    [("a river", "river", 1), ("river, hill", "river", 1 / 2), ("hill", "river", 0), ("the city hall", "city hall", 1)],
)
def test_a_class_is_right_when_no_other_is_named(reply: str, answer: str, expected: float):
    assert score("classification", reply, answer, classes=CLASSES) == expected


@given(st.sampled_from(sorted(set(METRICS) - {"classification", "first-line-classification"})), texts, texts)
def test_scores_are_shares(name: str, reply: str, answer: str):
    assert 0 <= score(name, reply, answer) <= 1


@given(texts.filter(words))
def test_a_text_is_wholly_like_itself(text: str):
    assert score("rouge-l", text, text) == 1
    assert score("code-similarity", text, text) == 1


@given(texts, texts)
def test_the_longest_common_subsequence_is_symmetric(one: str, other: str):
    assert score("rouge-l", one, other) == score("rouge-l", other, one)


def test_an_item_scores_by_its_metric():
    item = Item("made", "p", "a b", ("a", "b"), metric="contains-all")
    assert (item.score("b"), item.is_right("b"), item.is_right("b a")) == (0.5, False, True)
    assert item.is_done("b a then more")
    assert not Item("made", "p", "a", ("a",), metric="f1").is_done("a")
    assert Item("made", "p", "a").score("a") == 0
    assert Item("made", "p", "", ("river",), metric="classification", classes=CLASSES).score("river") == 1
    with pytest.raises(InputError, match=r"unknown metric 'contain-all'. Did you mean 'contains-all'"):
        Item("made", "p", "a", metric="contain-all")
