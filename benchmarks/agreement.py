"""What kvpress and lazyllm score, token by token, on the same weights and the same prompt.

    python benchmarks/agreement.py --tokens 512

kvpress runs in an environment of its own, as in others.py. Its scores are by K/V head and lazyllm's by layer, so the
mean over heads is compared. The table goes to out/agreement.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from others import INSTALLS, WORKERS, interpreter
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from lazyllm import AccumulatedAttention, KeyNorm, LazyPipeline, ScoreContext, Scorer, SinkRecent, WindowAttention
from lazyllm.caches import EvictingCache
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.export import write_checkpoint
from lazyllm.evaluation.workers import Worker
from lazyllm.models.loading import load_model
from lazyllm.policies.scorers.composed import ComposedScorer

WINDOW = 32
console = Console()


class Noting(ComposedScorer):
    """Another scorer's scores, and a list of them."""

    scorer: Scorer
    noted: list[Any]

    @property
    def parts(self) -> tuple[Scorer, ...]:
        return (self.scorer,)

    def score(self, context: ScoreContext) -> Tensor:
        scores = self.scorer.score(context)
        self.noted.append(scores.double().cpu())
        return scores


@dataclass(frozen=True)
class Method:
    """The same idea in both libraries.

    Attributes:
        press, options: kvpress's name for it, and its fields.
        scorer: lazyllm's.
        left_out: how many tokens at the end are kept whatever they score, as those of an observation window are.
        per_query: whether kvpress divides a token's sum by the number of queries that can see it.
    """

    press: str
    options: dict[str, Any]
    scorer: Scorer
    left_out: int = 0
    per_query: bool = False


METHODS = (
    Method("SnapKV", {"window_size": WINDOW, "kernel_size": 1}, WindowAttention(window=WINDOW), left_out=WINDOW),
    Method("KNorm", {}, KeyNorm()),
    Method("ObservedAttention", {}, AccumulatedAttention(), per_query=True),
    Method("StreamingLLM", {"n_sink": 4}, SinkRecent(sinks=4)),
)


def main(
    tokens: Annotated[int, typer.Option(min=64, help="Length of the prompt.")] = 512,
    keep: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the tokens compared as kept.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder of the results, the environment and converted weights.")] = Path(
        "out"
    ),
) -> None:
    try:
        source = packaged_model()
        with console.status(f"loading {source.name}"), quiet_loading():
            model, tokenizer = load_model(source, dtype=torch.float32)
        folder = out / "weights" / source.stem
        if not folder.exists():
            write_checkpoint(source, folder)
        ids = packaged_text(tokenizer, tokens)[:tokens]
        python = interpreter(out / "venvs" / "kvpress", INSTALLS["kvpress"])
        command = [str(python), str(WORKERS / "kvpress_worker.py"), str(folder), "float32", "1"]
        worker = Worker("kvpress", command, log=out / "logs" / "kvpress-scores.log")
        worker.start()
        try:
            rows = [compared(method, model, worker, ids, keep) for method in METHODS]
        finally:
            worker.close()
        head = [
            f"kvpress {worker.about.get('kvpress', '')}, SmolLM2-135M-Instruct, float32, {tokens} tokens; "
            f"kept: the best {keep:.0%}",
            "",
            "| kvpress | lazyllm | layers | largest difference, of the range | kept alike, worst layer |",
            "|---|---|---|---|---|",
        ]
        page = "\n".join(head + rows)
        (out / "agreement.md").write_text(page + "\n", encoding="utf-8")
        console.print(Markdown(page))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def compared(method: Method, model: Any, worker: Worker, ids: list[int], keep: float) -> str:
    """One row of the table."""
    answer = worker.ask(
        {"press": method.press, "options": method.options, "compression_ratio": 0.5, "scores": True, "token_ids": ids}
    )
    theirs = torch.tensor(answer["scores"], dtype=torch.float64).mean(1)
    if method.per_query:
        theirs = theirs * torch.arange(len(ids), 0, -1)
    ours = ours_of(method.scorer, model, ids)
    judged = slice(0, len(ids) - method.left_out)
    pairs = [(scaled(left[judged]), scaled(right[judged])) for left, right in zip(theirs, ours, strict=True)]
    count = int(keep * len(ids))
    alike = [kept_alike(left, right, min(count, left.numel())) for left, right in pairs]
    worst = max(float((left - right).abs().max()) for left, right in pairs) if method.press != "StreamingLLM" else None
    shown = "order alone" if worst is None else f"{worst:.1e}"
    return f"| {method.press} | `{method.scorer}` | {len(pairs)} | {shown} | {min(alike):.1%} |"


def ours_of(scorer: Scorer, model: Any, ids: list[int]) -> list[Tensor]:
    """By layer, lazyllm's scores [t] of a prompt."""
    noting = Noting(scorer=scorer, noted=[])
    cache = EvictingCache(scorer=noting, budget=1)
    pipe = LazyPipeline(model, schedule="Constant(1.0, start=0)", cache=cache)
    with torch.no_grad(), pipe.attached() as lazy:
        lazy(torch.tensor([ids]), past_key_values=pipe.new_cache(), logits_to_keep=1)
    kept = pipe.config.cache
    assert isinstance(kept, EvictingCache)
    assert isinstance(kept.scorer, Noting)
    return kept.scorer.noted


def scaled(scores: Tensor) -> Tensor:
    """Scores [t] from 0 to 1."""
    return (scores - scores.min()) / (scores.max() - scores.min()).clamp(min=1e-300)


def kept_alike(left: Tensor, right: Tensor, count: int) -> float:
    """Share of the `count` best tokens of one that are among those of the other."""
    best = [set(scores.topk(count).indices.tolist()) for scores in (left, right)]
    return len(best[0] & best[1]) / count


if __name__ == "__main__":
    typer.run(main)
