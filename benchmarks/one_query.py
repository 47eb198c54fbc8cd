"""Attention of one query, as a decode step needs it: what lazyllm does beside what else could be done.

    python benchmarks/one_query.py --keys 650,4096,8192 --rounds 20

Each way attends to the keys of 30 layers one after the other, so that the processor's cache holds none of them from the
time before; one way after the other in every round. Writes out/one_query.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import Spread
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.sections import Section, command_line, in_rounds, save_page
from lazyllm.models.attention import shared_heads
from lazyllm.models.loading import DTYPES, dtype_named

# isort: split
# behind lazyllm, which keeps back what torchao logs while transformers imports it
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Way = Callable[[Tensor, Tensor, Tensor], Tensor]

console = Console(width=None if Console().is_terminal else 160)


def stock(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = query.shape[1] // keys.shape[1], True  # type: ignore[assignment]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    output: Tensor = sdpa(module, query, keys, values, None, scaling=query.shape[3] ** -0.5)[0]
    return output


def own(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return shared_heads(nn.Module(), query, keys, values, None, scaling=query.shape[3] ** -0.5)[0]


def grouped_heads(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, keys, values, enable_gqa=True).transpose(1, 2)


def products(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    groups, size = keys.shape[1], query.shape[3]
    scores = torch.matmul(query.view(1, groups, -1, size) * size**-0.5, keys.transpose(2, 3))
    return torch.matmul(scores.softmax(-1), values).reshape(1, 1, -1, size)


WAYS: dict[str, Way] = {
    "lazyllm: heads of a group as queries, sdpa": own,
    "transformers, sdpa": stock,
    "sdpa that knows groups": grouped_heads,
    "grouped matrix products and softmax": products,
}


def main(
    keys: Annotated[str, typer.Option(help="Numbers of keys.")] = "650,4096,8192",
    dtypes: Annotated[str, typer.Option(help="Dtypes.")] = "float32,bfloat16",
    heads: Annotated[int, typer.Option(min=1, help="Query heads; SmolLM2's unless given.")] = 9,
    groups: Annotated[int, typer.Option(min=1, help="Heads of keys and values.")] = 3,
    size: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers one after the other.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one to warm up.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder of the Markdown table.")] = Path("out"),
) -> None:
    try:
        kinds, counts = names_in(dtypes, known=DTYPES), numbers_in(keys)
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    rows = []
    for kind in kinds:
        for count in counts:
            query = torch.randn(1, heads, 1, size).to(dtype_named(kind))
            shape = (layers, 1, groups, count, size)
            stored = list(zip(torch.randn(shape).to(query.dtype), torch.randn(shape).to(query.dtype), strict=True))
            for name, spread in timed(query, stored, rounds).items():
                rows.append([kind, f"{count:,}", name, spread.show(0, factor=1e6 / layers)])
    section = Section(
        title="Attention of one query",
        conditions=f"{heads} heads of {size}, {groups} of keys and values, {layers} layers, {torch.get_num_threads()} "
        f"threads; {in_rounds(rounds)}; `{command_line()}`.",
        columns=["dtype", "keys", "way", "microseconds per layer"],
        rows=rows,
    )
    console.print(Markdown(section.markdown()))
    console.print("written:", save_page([section], out / "one_query.md"))


@torch.no_grad()
def timed(query: Tensor, stored: Sequence[tuple[Tensor, Tensor]], rounds: int) -> dict[str, Spread]:
    """Seconds of every way over all layers."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, way in WAYS.items():
            started = time.perf_counter()
            for keys, values in stored:
                way(query, keys, values)
            if number:
                taken[name].append(time.perf_counter() - started)
    return {name: Spread.of(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    typer.run(main)
