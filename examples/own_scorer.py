"""A scorer of one's own: twenty lines, checked with the test kit, and compared with others on a few items.

    python examples/own_scorer.py
    python examples/own_scorer.py --task squad --items 12 --keep 0.1

A scorer says how important each token of the context is for the next one. This one looks for what the question says in
the same words: two tokens in a row that stand in both. The table shows how much of the passage that holds the answer
each scorer would keep. Needs no network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

import torch
import typer
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from lazyllm import (
    Constant,
    GenerationResult,
    InputError,
    LastTokenAttention,
    LateInteraction,
    LazyPipeline,
    Random,
    ScoreContext,
    Scorer,
)
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.scorers import judge_scorers
from lazyllm.evaluation.tasks import Item, Maker, make_items
from lazyllm.policies.query import Query
from lazyllm.testing import check_scorer

KEEPS = [0.1, 0.3]


class SharedPairs(Scorer):
    """How many pairs of neighbouring tokens nearby stand in the question too.

    `s_i = mean_{|j-i| <= reach} [(id_j, id_{j+1}) occurs in the query]`.

    Attributes:
        reach: how far a pair is felt, in tokens to either side.
    """

    reach: Annotated[int, Field(ge=0)] = 24

    @property
    def reads_query(self) -> Query:
        """The question, where the prompt has one."""
        return "auto"

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] in [0, 1]; higher = keep."""
        if context.token_ids is None:
            raise InputError("SharedPairs reads token ids, but the model was given inputs_embeds")
        ids = context.token_ids.long()
        pairs = ids[:-1] * (int(ids.max()) + 1) + ids[1:]
        asked = context.query[context.query < len(pairs)]
        shared = torch.isin(pairs, pairs[asked])
        shared[asked] = False  # the question itself is protected, and says nothing about its neighbours
        width = 2 * self.reach + 1
        each = pad(shared.float(), (0, 1))[None]
        near = avg_pool1d(each, width, stride=1, padding=self.reach, count_include_pad=False)
        return near[0, context.tokens]


def main(
    task: Annotated[str, typer.Option(help="A task with evidence: needle, squad, hotpot, records.")] = "squad",
    items: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 6,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the prompts.")] = 1024,
    keep: Annotated[list[float], typer.Option(help="Keep ratio; may be repeated.")] = KEEPS,
    layer: Annotated[int, typer.Option(min=1, help="Before which layer tokens are pruned.")] = 1,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
) -> None:
    check_scorer(SharedPairs(), SharedPairs(reach=0), SharedPairs(reach=3))
    print("SharedPairs keeps the rules of lazyllm.testing.\n")
    schedule = Constant(keep=keep[0], start=layer)
    with quiet_loading():
        pipe = LazyPipeline.from_pretrained(
            model or packaged_model(), dtype="float32", scorer=SharedPairs(), schedule=schedule
        )
    assert pipe.tokenizer is not None
    made = make_items(task, Maker(pipe.tokenizer, tokens), items)
    print(f"{task}, {items} prompts of {tokens:,} tokens, pruned before layer {layer}: share of the evidence kept\n")
    compare(pipe, task, made, keep, layer)
    reply = cast(GenerationResult, pipe.generate(made[0].prompt, max_new_tokens=made[0].new_tokens, do_sample=False))
    print(f"\nThe first prompt, {reply.stats.prefill_computed_fraction:.0%} of it computed: {reply.text.strip()!r}")
    print(f"Right is {' or '.join(map(repr, made[0].answers))}.")


def compare(pipe: LazyPipeline, task: str, items: Sequence[Item], keeps: Sequence[float], layer: int) -> None:
    """A row for each scorer, a column for each keep ratio."""
    scorers = {kind.__name__: kind() for kind in (SharedPairs, LateInteraction, LastTokenAttention, Random)}
    found = judge_scorers(pipe.model, pipe.tokenizer, {task: items}, layers=[layer], keeps=keeps, scorers=scorers)
    kept = {(one.scorer, one.keep): one.recall or 0.0 for one in found}
    print(f"{'scorer':20}" + "".join(f"{f'keep {ratio:g}':>10}" for ratio in keeps))
    for name in scorers:
        print(f"{name:20}" + "".join(f"{kept[name, ratio]:10.2f}" for ratio in keeps))


if __name__ == "__main__":
    typer.run(main)
