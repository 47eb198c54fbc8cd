"""A small ablation from Python: two scorers at three keep ratios, beside the unmodified model, on the same prompts.

    python examples/ablation.py
    python examples/ablation.py --task squad --items 24 --tokens 2048

The study can be stopped at any moment; the same command goes on from there, and computes nothing twice. With more items
only these are run. The table says what pruning gains and costs, the comparison whether a difference is one, and the
figure shows both. Needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lazyllm.ablation import Study
from lazyllm.ablation.comparisons import comparisons
from lazyllm.ablation.drawing import save_figure
from lazyllm.ablation.engine import StudyCallback
from lazyllm.ablation.plan import Plan
from lazyllm.ablation.results import Results
from lazyllm.ablation.units import Record
from lazyllm.evaluation.compare import Line

OUT = Path("out")


class Counting(StudyCallback):
    """Says how much is known, and writes a point for every unit: one prompt under one configuration."""

    def on_start(self, plan: Plan, todo: int, known: int) -> None:
        print(f"{len(plan.cells)} configurations, {known} units known, {todo} to run ", end="", flush=True)

    def on_unit(self, record: Record) -> None:
        print("." if record.is_done else "!", end="", flush=True)

    def on_finish(self, results: Results) -> None:
        print("\n")


def main(
    task: Annotated[str, typer.Option(help="A task; docs/measures.md lists them.")] = "needle",
    items: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 3,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the prompts.")] = 768,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = OUT / "example-ablation",
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
) -> None:
    study = Study(
        name="scorers and keep ratios",
        model=model or "packaged",
        tasks={task: items},
        tokens=tokens,
        config="recommended",  # its cache and protected tokens; the axes change the rest
        axes=[
            {"field": "scorer", "values": {"last token": "LastTokenAttention", "late interaction": "LateInteraction"}},
            {"field": "schedule", "sweep": "Constant(KEEP, start=3)", "keep": [0.5, 0.25, 0.1]},
        ],
        figures=[{"kind": "curves", "x": "speedup", "y": "loss_change", "by": "scorer"}],
    )
    results = study.run(out, callbacks=[Counting()])
    print(f"{'':44}{'speedup':>8} {'computed':>9} {'right':>6} {'change of loss, with its 95 % interval':>40}")
    for line in results.lines():
        print(row(line))
    print()
    for one in comparisons(results, by="loss"):
        print(f"{one.cell:44}{one.decision} (p {one.adjusted_p_value:.2f}, margin {one.margin:g}, {one.pairs} pairs)")
    figure = save_figure(results, study.figures[0], out / "curves.png")
    print(f"\n{figure}: change of loss over speedup. All of it again: lazyllm study table {out}")


def row(line: Line) -> str:
    speedup = "" if line.speedup is None else f"{line.speedup.estimate:.1f}x"
    change = line.loss_change
    return (
        f"{line.cell:44}{speedup:>8} {line.computed_fraction:>9.0%} {line.score or 0:>6.2f} "
        f"{f'{change.estimate:+.2f} ({change.low:+.2f} to {change.high:+.2f})':>40}"
    )


if __name__ == "__main__":
    typer.run(main)
