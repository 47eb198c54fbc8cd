"""Tasks with options, tasks that count, and items from files: each holds the answer it says it holds."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import InputError
from lazyllm.evaluation.options import names_in
from lazyllm.evaluation.tasks import Item, Maker, make_items
from lazyllm.evaluation.tasks.longbench import NOTE, SETS, shortened
from lazyllm.evaluation.tasks.spec import parsed
from tests.tiny import word_tokenizer

TOKENS = 1500
TOKENIZER = word_tokenizer(["?"])
MAKER = Maker(TOKENIZER, TOKENS)


def text_of(item: Item) -> str:
    return item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]


def document_of(item: Item) -> str:
    return text_of(item).rpartition("\n\n")[0]


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("tokens", [1000, 3000])
def test_a_needle_stands_at_its_depth(depth: float, tokens: int):
    for one in make_items(f"needle(depth={depth}, tokens={tokens})", MAKER, 3):
        document, (fact,) = document_of(one), one.evidence
        assert abs(document.index(fact) / (len(document) - len(fact)) - depth) < 0.1
        assert document.count(fact) == 1
        assert 0.6 * tokens < MAKER.count(text_of(one)) <= tokens


def test_the_same_needle_is_hidden_at_every_depth():
    items = [make_items(f"needle(depth={depth})", MAKER, 2) for depth in (0, 0.5, 1)]
    assert len({(one[0].answers, one[1].answers) for one in items}) == 1
    plain = make_items("needle", MAKER, 2)
    assert [one.answers for one in plain] == [one.answers for one in items[0]]
    assert Counter(document_of(items[0][0]).split()) == Counter(document_of(plain[0]).split())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_needles_are_graded(count: int):
    (one,) = make_items(f"needles(count={count})", MAKER, 1)
    assert len(one.answers) == len(one.evidence) == count
    assert one.score(" and ".join(one.answers[1:])) == (count - 1) / count
    assert all(fact in text_of(one) for fact in one.evidence)


@pytest.mark.parametrize("spec", ["vt", "vt(hops=2, chains=3)"])
def test_variables_get_their_value_by_the_assignments_in_the_text(spec: str):
    (one,) = make_items(spec, MAKER, 1)
    values: dict[str, str] = {}
    for name, of in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\.", document_of(one)):
        values[name] = values.get(of, of)
    wanted = re.search(r"have the value (\d{5})", text_of(one))[1]
    assert {name for name, value in values.items() if value == wanted} == set(one.answers)
    assert all(value.isdecimal() for value in values.values()), "each variable comes after the one it is given"
    assert len(values) == (5 if spec == "vt" else 9)


@pytest.mark.parametrize(("task", "answers"), [("cwe", 10), ("fwe", 3), ("fwe(alpha=1.5)", 3)])
@pytest.mark.parametrize("tokens", [500, 1500, 4000])
def test_the_words_that_are_asked_for_are_the_frequent_ones(task: str, answers: int, tokens: int):
    (one,) = make_items(task, Maker(TOKENIZER, tokens), 1)
    ranked = Counter(re.findall(r"[a-z]+", document_of(one))).most_common()
    assert {word for word, _ in ranked[:answers]} == set(one.answers)
    assert ranked[answers - 1][1] > ranked[answers][1]
    assert 0.7 * tokens < MAKER.count(text_of(one)) <= 1.1 * tokens


@pytest.mark.parametrize("hops", [1, 2])
def test_facts_stand_in_the_sheets_that_are_named(hops: int):
    for one in make_items(f"facts(hops={hops})", MAKER, 8):
        sheets = {sheet.splitlines()[0]: sheet for sheet in document_of(one).split("\n\n")}
        field, name = re.search(r"What is the ([\w ]+?) of (?:the neighbour of )?(\w+)\?", text_of(one)).groups()
        assert all(re.search(r"neighbour: (\w+)", sheet)[1] in sheets for sheet in sheets.values())
        asked = sheets[name]
        if hops == 2:
            asked = sheets[re.search(r"neighbour: (\w+)", asked)[1]]
        assert f"{field}: {one.answers[0]}" in asked.splitlines()
        assert one.evidence[-1] == asked
        assert len(one.evidence) == hops


def test_the_second_question_has_evidence_of_its_own():
    for one in make_items("follow-up", MAKER, 4):
        (fact,) = one.evidence
        first = re.search(r"secret number of (\w+)\?", text_of(one))[1]
        assert first not in fact
        assert re.search(r"secret number of (\w+)\?", one.follow_up)[1] in fact
        assert one.answers[0] in fact


options = st.dictionaries(st.sampled_from(["depth", "a", "b_c"]), st.integers() | st.text(max_size=4))


@given(options)
def test_options_are_read_as_they_are_written(given_options):
    text = ", ".join(f"{name}={value!r}" for name, value in given_options.items())
    assert parsed(f"follow-up({text})") == ("follow-up", given_options)


def test_commas_in_brackets_do_not_part_names():
    names = ["needle(depth=0.5, tokens=9)", "squad", "vt(hops=2)"]
    assert names_in(", ".join(names)) == names_in(",".join(names)) == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("needle(depht=1)", r"unknown option 'depht'. Did you mean 'depth'.*tokens"),
        ("needle(depth=2)", "from 0 to 1, not 2"),
        ("needle(depth='low')", "from 0 to 1, not 'low'"),
        ("needle(0.5)", r"written like .*not 'needle\(0.5\)'"),
        ("needle(", "written like"),
        ("needle(depth=low)", "written like"),
        ("needle(tokens=0)", "from 1 on, not 0"),
        ("needles(count=5)", "2, 3 or 4 numbers, not 5"),
        ("vt(hops=0)", "vt: hops is a whole number from 1 on, not 0"),
        ("fwe(alpha=1)", "above 1, not 1"),
        ("facts(hops=3)", "1 or 2, not 3"),
        ("facts(tokens=70)", "70 tokens hold 0"),
        ("cwee", "unknown task 'cwee'. Did you mean 'cwe'.*file:PATH"),
    ],
)
def test_what_a_task_does_not_know_is_refused(name: str, message: str):
    with pytest.raises(InputError, match=message):
        make_items(name, MAKER, 1)


def written(path, *lines) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def test_items_of_a_file_are_what_it_says(tmp_path):
    chat = [{"role": "user", "content": "who?"}]
    path = written(
        tmp_path / "mine.jsonl",
        {"prompt": "a\u2028b c", "answers": "c", "reference": " c", "evidence": ["b"]},
        "",
        {"prompt": chat, "answers": ["x", "y"], "metric": "contains-all", "new_tokens": 4},
        {"prompt": "no more"},
    )
    first, second, third = make_items(f"file:{path}", MAKER, 9)
    assert first == Item("mine", "a\u2028b c", " c", ("c",), ("b",))
    assert second == Item("mine", chat, "", ("x", "y"), new_tokens=4, metric="contains-all")
    assert third.answers == ()
    assert make_items(f"file:{path}", MAKER, 1) == [first]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[1]", r"line 1 holds '\[1\]', not an object"),
        ({"answers": ["a"]}, "needs a prompt.*not None"),
        ({"prompt": "a", "answer": "b"}, "line 1: unknown field 'answer'. Did you mean 'answers'"),
        ({"prompt": "a", "answers": [1]}, "line 1: answers.*got 1"),
        ({"prompt": [{"role": "user"}]}, "line 1: prompt.*content"),
        ({"prompt": "a", "new_tokens": "8"}, "new_tokens: .*got '8'"),
        ({"prompt": "a", "metric": "f2"}, "line 1: unknown metric 'f2'"),
        ({"prompt": "a", "metric": "classification"}, "line 1: metric 'classification' needs the classes"),
        ("", "holds no items"),
    ],
)
def test_a_line_that_is_no_item_is_refused(tmp_path, line, message: str):
    path = written(tmp_path / "mine.jsonl", line)
    with pytest.raises(InputError, match=message):
        make_items(f"file:{path}", MAKER, 1)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot read items from .*gone"):
        make_items(f"file:{tmp_path / 'gone.jsonl'}", MAKER, 1)


ANSWERS = {
    "passage_count": "7",
    "passage_retrieval_en": "Paragraph 5",
    "passage_retrieval_zh": "段落5",
    "trec": "City",
    "lsht": "City",
}


def longbench_line(name: str, words: int = 50) -> dict:
    return {
        "input": "Who {came}?",
        "context": " ".join(f"w{index}" for index in range(words)),
        "answers": [ANSWERS.get(name, "Ann Lee"), "Ann"][: 1 if name in ANSWERS else 2],
        "all_classes": ["City", "River"] if name in ("trec", "lsht") else None,
        "length": words,
        "dataset": name,
        "language": "en",
        "_id": "0",
    }


@pytest.mark.parametrize("name", [*SETS, "hotpotqa_e"])
def test_every_set_of_longbench_is_read_and_scored(tmp_path, name: str):
    line = longbench_line(name)
    written(tmp_path / f"{name}.jsonl", line, line)
    one, _ = make_items(f"longbench:{tmp_path}/{name}", MAKER, 5)
    kind = SETS[name.removesuffix("_e")]
    text = text_of(one)
    assert line["context"] in text
    assert ("Who {came}?" in text) == ("{input}" in kind.after)
    assert isinstance(one.prompt, str) != kind.chats
    assert one.score(line["answers"][0]) == 1
    assert one.score("nothing of it") < 0.5
    assert one.is_right(one.reference.strip())


def test_long_contexts_lose_their_middle(tmp_path):
    written(tmp_path / "hotpotqa.jsonl", longbench_line("hotpotqa", 5000))
    (one,) = make_items(f"longbench:{tmp_path}/hotpotqa", MAKER, 1)
    text = text_of(one)
    assert 0.9 * TOKENS < MAKER.count(text) <= TOKENS
    assert all(part in text for part in ("w0 w1", NOTE, "w4998 w4999", "Who {came}?"))
    assert "w2500" not in text


@given(st.integers(8, 60), st.integers(1, 80))
def test_a_shortened_text_fits(tokens: int, words: int):
    text = " ".join(f"w{index}" for index in range(words))
    short = shortened(MAKER, text, tokens)
    assert MAKER.count(short) <= tokens
    assert (short == text) == (words <= tokens)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("hotpot", None, "unknown set of LongBench 'hotpot'. Did you mean 'hotpotqa'"),
        ("trec", None, "no file .*trec.jsonl.*files as published: narrativeqa.jsonl.*THUDM/LongBench"),
        ("trec", {"input": "a"}, "line 1 has no field 'context'"),
        ("trec", {**longbench_line("trec"), "answers": []}, r"a list that is not empty, not \[\]"),
    ],
)
def test_what_is_not_longbench_is_refused(tmp_path, name: str, line, message: str):
    if line is not None:
        written(tmp_path / f"{name}.jsonl", line)
    with pytest.raises(InputError, match=message):
        make_items(f"longbench:{tmp_path}/{name}", MAKER, 1)
