"""LongBench from a folder on this machine (Bai et al. 2023, arXiv 2308.14508).

The files are read as published, one JSON-lines file for each set. Prompts are in words of their own, so that scores
compare runs with each other, not with published tables.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.tasks.files import objects
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker

NEEDED = ("input", "context", "answers", "all_classes")
NOTE = "[...]"
"""Stands where the middle of a context was left out."""


@dataclass(frozen=True)
class Kind:
    """How a set is asked and scored.

    Attributes:
        before, after: what stands around the context; `{input}` is the item's own question.
        metric: a name of `METRICS`.
        new_tokens: how long a reply may be, as published.
        chats: whether a chat model is asked in a chat; not where examples or code are to be gone on with.
    """

    before: str
    after: str
    metric: str
    new_tokens: int
    chats: bool = True


_QA = Kind(
    "Read the text and answer the question below it.",
    "Answer from the text above, in as few words as you can and without explaining.\n\nQuestion: {input}\nAnswer:",
    "f1",
    32,
)
_QA_ZH = Kind("阅读文本，然后回答后面的问题。", "只根据上文，用尽量少的字回答。\n\n问题：{input}\n回答：", "f1", 64)
_SUMMARY = Kind("Here is a long text.", "Summarise the text above on one page.\n\nSummary:", "rouge-l", 512)
_EXAMPLES = Kind("Go on as in the examples.", "{input}", "first-line-f1", 32, chats=False)
_CODE = Kind("", "{input}", "code-similarity", 64, chats=False)
_WHICH = "Which paragraph is this a summary of? Reply with its name, such as Paragraph 3.\n\n{input}\n\nParagraph name:"
_WHICH_ZH = "{input}\n\n摘要说的是哪一段？只回答段落名，例如“段落3”。\n\n段落："

SETS: dict[str, Kind] = {
    "narrativeqa": replace(_QA, new_tokens=128),
    "qasper": replace(
        _QA,
        after='Answer from the text above, in as few words as you can; say "yes" or "no" where that is asked for, and '
        '"unanswerable" where the text does not tell.\n\nQuestion: {input}\nAnswer:',
        new_tokens=128,
    ),
    "multifieldqa_en": replace(_QA, new_tokens=64),
    "multifieldqa_zh": _QA_ZH,
    "hotpotqa": _QA,
    "2wikimqa": _QA,
    "musique": _QA,
    "dureader": replace(_QA_ZH, metric="rouge-l", new_tokens=128),
    "gov_report": _SUMMARY,
    "qmsum": replace(_SUMMARY, after="Answer this about the meeting above in some sentences.\n\n{input}\nAnswer:"),
    "multi_news": _SUMMARY,
    "vcsum": replace(_SUMMARY, before="下面是一份会议记录。", after="总结上面的会议记录。\n\n总结："),
    "trec": replace(_EXAMPLES, metric="first-line-classification", new_tokens=64),
    "triviaqa": _EXAMPLES,
    "samsum": replace(_EXAMPLES, metric="first-line-rouge-l", new_tokens=128),
    "lsht": replace(_EXAMPLES, before="按照例子继续。", metric="first-line-classification", new_tokens=64),
    "passage_count": Kind(
        "Some of the paragraphs below may be the same.",
        "How many different paragraphs are there? Reply with the number alone.\n\nNumber:",
        "count",
        32,
    ),
    "passage_retrieval_en": Kind("Below are thirty paragraphs and a summary of one of them.", _WHICH, "retrieval", 32),
    "passage_retrieval_zh": Kind("下面有若干段落，以及其中一段的摘要。", _WHICH_ZH, "retrieval", 32),
    "lcc": _CODE,
    "repobench-p": _CODE,
}


def longbench_items(folder: Path, name: str, maker: Maker, count: int) -> list[Item]:
    """The first `count` items of a set, or all where it has fewer; `hotpotqa_e` is that of LongBench-E.

    Contexts longer than `maker.tokens` lose their middle, as published; question and instruction stay whole.

    Raises:
        InputError: for an unknown set, a missing folder or file, or a line that is no item.
    """
    if (kind := SETS.get(name.removesuffix("_e"))) is None:
        raise InputError(unknown("set of LongBench", name, SETS))
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise InputError(
            f"there is no file {str(path)!r}. LongBench is read from a folder that holds its files as published: "
            f"{', '.join(f'{one}.jsonl' for one in SETS)}, for LongBench-E with _e behind the name. They come in the "
            "archive data.zip of the data set THUDM/LongBench"
        )
    return [_item(kind, name, fields, f"{path}, line {line}", maker) for line, fields in objects(path, count)]


def _check(fields: dict[str, Any], where: str) -> None:
    if missing := [name for name in NEEDED if name not in fields]:
        raise InputError(f"{where} has no field {missing[0]!r}; an item of LongBench has {', '.join(NEEDED)}")
    if not isinstance(fields["input"], str) or not isinstance(fields["context"], str):
        raise InputError(f"{where}: input and context are texts, not {fields['input']!r} and {fields['context']!r}")
    if not isinstance(fields["answers"], list) or not fields["answers"]:
        raise InputError(f"{where}: answers is a list that is not empty, not {fields['answers']!r}")


def _item(kind: Kind, name: str, fields: dict[str, Any], where: str, maker: Maker) -> Item:
    _check(fields, where)
    after = kind.after.replace("{input}", fields["input"])
    around = maker.count(kind.before) + maker.count(after) + 40
    context = shortened(maker, fields["context"], maker.tokens - around)
    glue = "" if kind.metric == "code-similarity" else "\n\n"
    text = glue.join(filter(None, [kind.before, context, after]))
    answers = tuple(map(str, fields["answers"]))
    return Item(
        f"longbench/{name}",
        maker.user(text) if kind.chats else text,
        answers[0] if kind.chats and maker.chats else f" {answers[0]}",
        answers,
        new_tokens=kind.new_tokens,
        metric=kind.metric,
        classes=tuple(fields["all_classes"] or ()),
    )


def shortened(maker: Maker, text: str, tokens: int) -> str:
    """A text of at most `tokens`, its middle left out where it is longer."""
    encoded = maker.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    if len(offsets) <= tokens:
        return text
    half = max(1, (tokens - maker.count(NOTE)) // 2)
    return f"{text[: offsets[half - 1][1]]}\n{NOTE}\n{text[offsets[-half][0] :]}"
