"""Studies in the trackers that people have: MLflow and TensorBoard, as callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lazyllm.ablation.engine import StudyCallback
from lazyllm.errors import InputError, unknown
from lazyllm.extras import needed

if TYPE_CHECKING:
    from lazyllm.ablation.results import Results
    from lazyllm.evaluation.compare import Line

TRACKERS = ("mlflow", "tensorboard")
MOST_RUNS = 50_000
"""What MLflow gives at once."""


class MLflow(StudyCallback):
    """A run in MLflow for every cell: axis labels and conditions as parameters, what was found as metrics.

    Args:
        uri: of the tracking server or store; None = MLflow's own default.

    Raises:
        InputError: when MLflow is not installed.
    """

    def __init__(self, uri: str | None = None) -> None:
        mlflow = needed("mlflow", what="the tracker mlflow", extra="track")
        self._client = mlflow.MlflowClient(tracking_uri=uri)

    def on_finish(self, results: Results) -> None:
        """Writes every cell; one that was written before gets its new figures."""
        name = results.plan.name
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        known = self._client.search_runs([experiment], max_results=MOST_RUNS)
        before = {run.data.tags.get("mlflow.runName"): run.info.run_id for run in known}
        for cell in results.plan.cells.values():
            run = before.get(cell.name)
            if run is None:
                run = self._client.create_run(experiment, run_name=cell.name).info.run_id
                for key, value in {**cell.setting, **cell.labels}.items():
                    self._client.log_param(run, _key(key), value)
            for line in (line for line in results.lines() if line.cell == cell.name):
                for figure, value in _figures(line):
                    self._client.log_metric(run, _key(f"{line.task}/{figure}"), value)
            self._client.set_terminated(run)


class TensorBoard(StudyCallback):
    """Event files for TensorBoard, a subfolder per cell.

    Args:
        folder: where they are written.

    Raises:
        InputError: when TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        needed("tensorboard", what="the tracker tensorboard", extra="track")
        self._writer = import_module("torch.utils.tensorboard").SummaryWriter
        self._folder = Path(folder)

    def on_finish(self, results: Results) -> None:
        """Writes every line."""
        for line in results.lines():
            with self._writer(str(self._folder / line.cell.replace("/", "_"))) as writer:
                for figure, value in _figures(line):
                    writer.add_scalar(f"{line.task}/{figure}", value, line.items)


def tracker_named(text: str) -> StudyCallback:
    """The tracker that `mlflow`, `mlflow:URI` or `tensorboard:FOLDER` means.

    Raises:
        InputError: for another one, or one that is not installed.
    """
    name, _, place = text.partition(":")
    if name not in TRACKERS:
        raise InputError(unknown("tracker", name, TRACKERS))
    return MLflow(place or None) if name == "mlflow" else TensorBoard(place or "runs")


def _figures(line: Line) -> Iterator[tuple[str, float]]:
    """The numbers of a line by name; of an effect its estimate."""
    for name, value in line.to_dict().items():
        number = value["estimate"] if isinstance(value, dict) else value
        if isinstance(number, (int, float)):
            yield name, float(number)


def _key(text: str) -> str:
    """A name as MLflow takes it."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in text)
