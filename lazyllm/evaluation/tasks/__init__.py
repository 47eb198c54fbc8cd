"""Long prompts with known answers and known evidence.

Tasks made from packaged data are functions of a seed, a length and a tokenizer, so that the same items can be made
again anywhere. Others read a file or a folder of LongBench.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.tasks.counting import common_words, frequent_words, variables
from lazyllm.evaluation.tasks.facts import facts
from lazyllm.evaluation.tasks.files import file_items
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.longbench import longbench_items
from lazyllm.evaluation.tasks.maker import Layout, Maker, Task
from lazyllm.evaluation.tasks.numbers import follow_up, later, needle, needles, rules
from lazyllm.evaluation.tasks.patterns import code, labels, prose, summary
from lazyllm.evaluation.tasks.people import german, records, table
from lazyllm.evaluation.tasks.questions import hotpot, squad
from lazyllm.evaluation.tasks.spec import options_of, parsed

TASKS: dict[str, Task] = {
    "needle": needle,
    "needles": needles,
    "follow-up": follow_up,
    "later": later,
    "squad": squad,
    "hotpot": hotpot,
    "labels": labels,
    "code": code,
    "prose": prose,
    "summary": summary,
    "records": records,
    "table": table,
    "german": german,
    "rules": rules,
    "facts": facts,
    "vt": variables,
    "cwe": common_words,
    "fwe": frequent_words,
}
FILE, LONGBENCH = "file:", "longbench:"
"""How names of tasks begin that read a JSON-lines file, or a set of LongBench: `longbench:FOLDER/hotpotqa`."""


def make_items(name: str, maker: Maker, count: int, *, seed: int = 0) -> list[Item]:
    """The first `count` items of a task; of files as many as they have.

    Args:
        name: a name of `TASKS`, with options where one wants other than the usual, `needle(depth=0.5, tokens=4000)`;
            `file:PATH`; or `longbench:FOLDER/SET`. Every task takes `tokens`, the length of its prompts. Options leave
            the seed of each item as it is: the same number is hidden at every depth.
        maker: tokenizer, and length unless `tokens` is given.
        count: how many items.
        seed: of what is drawn at random.

    Raises:
        InputError: for an unknown task or option, a file that cannot be read, or when packaged data is not installed.
    """
    if name.startswith(FILE):
        return file_items(Path(name.removeprefix(FILE)).expanduser(), count)
    if name.startswith(LONGBENCH):
        path = Path(name.removeprefix(LONGBENCH)).expanduser()
        return longbench_items(path.parent, path.name, maker, count)
    task, options = _read(name)
    own = replace(maker, tokens=options.pop("tokens", maker.tokens))
    return [TASKS[task](own, random.Random(f"{task}/{seed}/{index}"), **options) for index in range(count)]


def check_task(name: str) -> None:
    """Refuses names that `make_items` does not know; a file is not looked for.

    Raises:
        InputError: for an unknown task or option.
    """
    if not name.startswith((FILE, LONGBENCH)):
        _read(name)


def _read(name: str) -> tuple[str, dict[str, Any]]:
    """The task and its options."""
    task, options = parsed(name)
    if task not in TASKS:
        raise InputError(unknown("task", task, [*TASKS, f"{FILE}PATH", f"{LONGBENCH}FOLDER/SET"]))
    tokens = options.get("tokens", 1)
    if not isinstance(tokens, int) or tokens < 1:
        raise InputError(f"task {name!r}: tokens is a whole number from 1 on, not {tokens!r}")
    known = [*options_of(TASKS[task]), "tokens"]
    if strange := sorted(options.keys() - set(known)):
        raise InputError(f"task {name!r}: " + unknown("option", strange[0], known))
    return task, options


__all__ = ["TASKS", "Item", "Layout", "Maker", "Task", "check_task", "make_items"]
