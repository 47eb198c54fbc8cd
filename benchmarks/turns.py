"""A second question, about what the first one left out: in a conversation, and as a prompt of its own.

    python benchmarks/turns.py --items 32 --tokens 3072

Each item hides numbers in a long text; the first question asks for one of them, the second for another. The same
conversation, first reply included, goes on in four ways: by the preset on the cache of the first turn, by the preset
on an empty cache, which computes the whole conversation anew, and both with nothing pruned. Every way answers greedily,
and says the right answer whatever it would have said, for its loss. An item's ways follow one another in an order drawn
anew. Without --model it runs the packaged SmolLM2-135M-Instruct. Writes out/turns.md.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track

from lazyllm import Conversation, LazyPipeline
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import Spread, environment
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.sections import Section, command_line, conditions, save_page
from lazyllm.evaluation.statistics import Effect, median_ratio, paired_difference
from lazyllm.evaluation.tasks import Item, Maker, make_items
from lazyllm.models.loading import dtype_named, load_model

console = Console(width=None if Console().is_terminal else 160)
FRESH = "{preset}, whole conversation anew"
GOING_ON = "{preset}, in the conversation"


@dataclass(frozen=True)
class Outcome:
    """One way with one item."""

    score: float
    loss: float
    ttft_seconds: float


def main(
    items: Annotated[int, typer.Option(min=1, help="How many conversations.")] = 32,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the first prompt.")] = 3072,
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the table.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the items and of the order.")] = 0,
) -> None:
    try:
        source = model or str(packaged_model())
        with console.status("loading the model"), quiet_loading():
            network, tokenizer = load_model(source, dtype=dtype_named(dtype))
            network = network.to(device)
        pipes = {name: LazyPipeline.from_preset(name, network, tokenizer) for name in (preset, "dense")}
        made = make_items("follow-up", Maker(tokenizer, tokens), items, seed=seed)
        shuffled, found = random.Random(seed), defaultdict[str, list[Outcome]](list)
        second_turn(made[0], pipes, shuffled)  # the first run of a process pays for things no later one does
        for item in track(made, description="conversations", console=console):
            for name, outcome in second_turn(item, pipes, shuffled).items():
                found[name].append(outcome)
        said = conditions(
            Path(source).stem,
            dtype,
            environment(network),
            {preset: pipes[preset].config},
            tokens=f"first prompts of {tokens:,} tokens",
            baseline="nothing pruned, whole conversation anew",
            measured=f"{items} conversations, their ways in an order drawn anew; TTFT: median (min - max)",
            command=command_line(),
        )
        page = save_page([table(found, preset, said)], out / "turns.md")
        console.print(Markdown(page.read_text(encoding="utf-8")), f"written: {page}")
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def second_turn(item: Item, pipes: dict[str, LazyPipeline], shuffled: random.Random) -> dict[str, Outcome]:
    """What each way makes of an item's second question."""
    said: list[int] = []
    ways: dict[str, Conversation] = {}
    for name, pipe in pipes.items():
        chat = pipe.conversation()
        options = forced(said) if said else {"max_new_tokens": item.new_tokens}
        said = chat.ask(item.prompt[-1]["content"], **options, do_sample=False).token_ids
        ways[GOING_ON.format(preset=name)] = chat
        ways[FRESH.format(preset=name)] = emptied(pipe, chat)
    reference = next(iter(pipes.values())).encode(item.reference).token_ids
    return {name: judged(ways[name], item, reference) for name in shuffled.sample(list(ways), len(ways))}


def emptied(pipe: LazyPipeline, chat: Conversation) -> Conversation:
    """The same conversation, of which nothing is computed."""
    return Conversation.restored(pipe, chat.opening, chat.overflow, pipe.bound_cache(), chat.turns)


def judged(chat: Conversation, item: Item, right: list[int]) -> Outcome:
    """The reply to the second question, and the loss per token of the right one."""
    twin = chat.fork()
    reply = chat.ask(item.follow_up, max_new_tokens=item.new_tokens, do_sample=False)
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    logits = torch.cat(twin.ask(item.follow_up, **forced(right), **options).output.logits).float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(right, device=logits.device))
    return Outcome(item.score(reply.text), float(loss), reply.stats.ttft_seconds)


def forced(tokens: Sequence[int]) -> dict[str, Any]:
    """Options that let a reply be these tokens."""
    left = iter(tokens)
    return {"max_new_tokens": len(tokens), "prefix_allowed_tokens_fn": lambda *_: [next(left)]}


def table(found: dict[str, list[Outcome]], preset: str, said: str) -> Section:
    """One line for each way."""
    dense, fresh = found[FRESH.format(preset="dense")], found[FRESH.format(preset=preset)]
    columns = ["second turn", "TTFT, seconds", "of dense", "right", "won, lost", "loss", "change of loss"]
    notes = [
        "*Of dense*: median of the items' ratios to the baseline's TTFT. "
        f"*Won, lost* and *change of loss*: against {preset}, whole conversation anew."
    ]
    rows = [[name, *cells(outcomes, dense, fresh)] for name, outcomes in found.items()]
    return Section(f"{len(dense)} second questions", said, columns, sorted(rows), notes)


def cells(mine: Sequence[Outcome], dense: Sequence[Outcome], fresh: Sequence[Outcome]) -> list[str]:
    times = [one.ttft_seconds for one in mine]
    pairs = list(zip(mine, fresh, strict=True))
    won, lost = (sum(sign * (one.score - other.score) > 0 for one, other in pairs) for sign in (1, -1))
    change = paired_difference([one.loss for one in mine], [other.loss for other in fresh])
    return [
        Spread.of(times).show(2),
        interval(median_ratio(times, [other.ttft_seconds for other in dense]), "{:.3f}"),
        f"{sum(one.score for one in mine) / len(mine):.2f}",
        f"+{won} -{lost}",
        f"{sum(one.loss for one in mine) / len(mine):.2f}",
        interval(change, "{:+.2f}") if mine is not fresh else "",
    ]


def interval(effect: Effect, form: str) -> str:
    """An estimate with its 95 % interval."""
    return "{} ({} to {})".format(*map(form.format, (effect.estimate, effect.low, effect.high)))


if __name__ == "__main__":
    typer.run(main)
