"""A study: one frozen object, and one file, that says what is varied and on what it is measured."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import yaml
from pydantic import BeforeValidator, Field, PlainSerializer

from lazyllm.ablation.axes import Axis, Level, Written, shown
from lazyllm.ablation.cells import (
    PRESET,
    Cell,
    ModelRef,
    Question,
    Setting,
    apply,
    base_config,
    check_setting,
    check_tasks,
)
from lazyllm.ablation.figures import Figure
from lazyllm.config import LazyConfig, preset_names
from lazyllm.errors import ConfigError
from lazyllm.evaluation.data import PACKAGED
from lazyllm.evaluation.quality import STOCK
from lazyllm.extras import needed
from lazyllm.files.fields import mapping_in, text_in
from lazyllm.policies.base import Value

if TYPE_CHECKING:
    from lazyllm.ablation.engine import StudyCallback
    from lazyllm.ablation.models import Load
    from lazyllm.ablation.results import Results

MOST_CELLS = 100_000
"""More than that is a mistake in an axis."""
NAME = "name"


class Drawn(Value):
    """So many cells, drawn from the product of the axes."""

    random: Annotated[int, Field(ge=1)]


class Entry(Value):
    """What an explicit cell may say beside its changes.

    Attributes:
        name: what it is called.
        labels: where it lies on axes.
        axes: its product with these is run.
    """

    name: str = ""
    labels: dict[str, str] = Field(default_factory=dict)
    axes: tuple[Axis, ...] = ()


class Study(Value):
    """Configurations beside the unmodified model on the same items: the product of some axes, and cells of their own.

    Attributes:
        name: what it is called, and the folder of its results.
        model: hub id, folder or GGUF file; "packaged" is the SmolLM2 that comes as a Python package.
        dtype, weights, device: of the model; "auto" is a GPU where there is one.
        tasks: how many items of each task; a list of names takes `items` of each.
        items: how many, where `tasks` does not say.
        tokens: length of the prompts.
        question: where in a prompt its question stands; "later" is last, asked once the rest is loaded.
        seed: of the items, of drawn values, and of the order in which cells are run.
        config: what the axes vary: a preset, a path, or a mapping of fields with an optional `preset`.
        axes: their product is run.
        combine: "grid" for all of that product, or `{"random": 20}` for so many cells of it.
        cells: explicit ones, each a mapping of changes; with `axes` of its own it stands for their product, `labels`
            say where it lies on axes that it does not change, and `name` what it is called.
        figures: drawings of the results, for `lazyllm study figures` and the report.
        conclusions: what follows from the results, in words, for the report.

    Raises:
        ConfigError: for anything that cannot be, with the nearest name that exists.
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[^/\\\x00.][^/\\\x00]*$")] = "study"
    model: str = PACKAGED
    dtype: str = "float32"
    weights: str | None = None
    device: str = "auto"
    tasks: dict[str, int]
    items: Annotated[int, Field(ge=1)] = 24
    tokens: int = 2048
    question: Question = "last"
    seed: int = 0
    config: Annotated[LazyConfig, BeforeValidator(base_config), PlainSerializer(LazyConfig.to_dict)] = Field(
        default_factory=lambda: LazyConfig.preset("recommended")
    )
    axes: tuple[Axis, ...] = ()
    combine: Literal["grid"] | Drawn = "grid"
    cells: tuple[dict[str, Written], ...] = ()
    figures: tuple[Figure, ...] = ()
    conclusions: str = ""

    def __init__(self, **fields: Any) -> None:
        if "tasks" in fields:
            items = fields.get("items", type(self).model_fields["items"].default)
            fields["tasks"] = check_tasks(fields["tasks"], items)
        super().__init__(**fields)
        check_setting(self.setting)
        titles = {title for cell in self.all_cells() for title in cell.labels}
        for figure in self.figures:
            figure.check_axes(titles)

    @classmethod
    def from_text(cls, text: str, *, name: str = "study") -> Study:
        """The study in YAML or JSON text.

        Raises:
            ConfigError: when it is none.
        """
        return cls(**{NAME: name, **mapping_in(text, name, known=cls.model_fields)})

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Reads a study file; its name is the file's unless it gives one.

        Raises:
            ConfigError: when there is no such file, or it is no study.
        """
        path = Path(path)
        return cls.from_text(text_in(path, "study"), name=path.stem)

    def to_yaml(self) -> str:
        """The study as YAML text."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    @property
    def setting(self) -> Setting:
        """The conditions before any axis changes them."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        ref = ModelRef(self.model, self.dtype, self.weights, device)
        return Setting(ref, self.tokens, self.question, self.seed, tuple(self.tasks.items()))

    def all_cells(self) -> list[Cell]:
        """Every cell but the unmodified model's: those of the axes, then the explicit ones.

        Raises:
            ConfigError: when one cannot be, or two have one name.
        """
        return list(self._made)

    @cached_property
    def _made(self) -> tuple[Cell, ...]:
        made = [
            *self._crossed(self.axes, draws=True),
            *(cell for entry in self.cells for cell in self._explicit(entry)),
        ]
        if not made:
            made = [self._cell(self._own_name(), {}, {})]
        names = Counter(cell.name for cell in made)
        name, count = names.most_common(1)[0]
        if count > 1:
            raise ConfigError(f"two cells are called {name!r}; give one a name of its own")
        if STOCK in names:
            raise ConfigError(f"{STOCK!r} is the name of the unmodified model, which every study runs")
        return tuple(made)

    def notices(self) -> list[str]:
        """What is odd about the cells: those that are the same."""
        made = self.all_cells()
        alike: dict[Any, list[str]] = defaultdict(list)
        for cell in made:
            assert cell.config is not None
            alike[cell.setting, cell.config.to_json()].append(cell.name)
        if len(made) > 1 and len(alike) == 1:
            return [f"all {len(made)} cells are the same, so that nothing is compared but the unmodified model"]
        return [
            f"{', '.join(map(repr, names[1:]))} {'is' if len(names) == 2 else 'are'} the same as {names[0]!r}: "
            "computed once"
            for names in alike.values()
            if len(names) > 1
        ]

    def run(
        self,
        out: str | Path | None = None,
        *,
        workers: int = 1,
        ray: str | None = None,
        retry: bool = False,
        retime: bool = False,
        load: Load | None = None,
        callbacks: Sequence[StudyCallback] = (),
    ) -> Results:
        """Runs what is not known yet, and gives all results.

        Args:
            out: folder of the results, `out/NAME` unless given; the same one goes on where an earlier run stopped.
            workers: processes that share the work, each with the model; 1 = this process.
            ray: address of a Ray cluster that does the work instead, "local" for one of this machine.
            retry: runs again what failed before.
            retime: runs the unmodified model again beside cells that came later, and with it what ran apart from it
                before, so that their times can be compared.
            load: gives model and tokenizer for a `ModelRef`, instead of loading what it names.
            callbacks: told about every unit.

        Raises:
            InputError, ConfigError: before anything runs, and when the folder cannot be used or written.
        """
        needed("scipy", what="a study", extra="eval")
        from lazyllm.ablation.engine import Workforce, folder_of, run

        workforce = Workforce(workers, ray, load)
        return run(self, folder_of(self, out), workforce, callbacks, retry=retry, retime=retime)

    def _own_name(self) -> str:
        return next((name for name in preset_names() if LazyConfig.preset(name) == self.config), "config")

    def _crossed(
        self,
        axes: Sequence[Axis],
        *,
        draws: bool = False,
        name: str = "",
        changes: Mapping[str, Any] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> Iterator[Cell]:
        """The product of some axes, or what is drawn of it; each cell has the changes and labels that are given too."""
        if not axes:
            return
        _check_axes(axes, changes or {})
        points = self._points(axes)
        for point in self._drawn(points) if draws else points:
            own = {axis.title: level.label for axis, level in zip(axes, point, strict=True)}
            told = ", ".join([*([name] if name else []), *(f"{title}={label}" for title, label in own.items())])
            parts = {title: part for level in point for title, part in level.parts.items()}
            changed = {path: value for level in point for path, value in level.changes.items()}
            yield self._cell(told, {**(changes or {}), **changed}, {**(labels or {}), **own, **parts})

    def _points(self, axes: Sequence[Axis]) -> list[tuple[Level, ...]]:
        columns = [axis.levels(self.seed) for axis in axes]
        if (count := prod(map(len, columns))) > MOST_CELLS:
            raise ConfigError(f"the axes give {count:,} cells, more than {MOST_CELLS:,}")
        return list(product(*columns))

    def _drawn(self, points: list[tuple[Level, ...]]) -> list[tuple[Level, ...]]:
        """As many as `combine` says, in their order."""
        if not isinstance(self.combine, Drawn) or self.combine.random >= len(points):
            return points
        drawn = random.Random(f"{self.seed} cells").sample(range(len(points)), self.combine.random)
        return [points[index] for index in sorted(drawn)]

    def _explicit(self, entry: Mapping[str, Any]) -> Iterator[Cell]:
        """The cells of an entry of `cells`."""
        given = Entry(**{key: value for key, value in entry.items() if key in Entry.model_fields})
        changes = {path: value for path, value in entry.items() if path not in Entry.model_fields}
        titles = {axis.title: axis.paths for axis in self.axes}
        labels = {
            title: " + ".join(shown(changes[path]) for path in paths)
            for title, paths in titles.items()
            if all(path in changes for path in paths)
        } | given.labels
        if given.axes:
            name = given.name or ", ".join(given.labels.values())
            yield from self._crossed(given.axes, name=name, changes=changes, labels=labels)
            return
        parts = [shown(value) if path == PRESET else f"{path}={shown(value)}" for path, value in changes.items()]
        yield self._cell(given.name or ", ".join(parts) or self._own_name(), changes, labels)

    def _cell(self, name: str, changes: Mapping[str, Any], labels: Mapping[str, str]) -> Cell:
        try:
            setting, config = apply(self.setting, self.config, changes)
        except ConfigError as error:
            raise ConfigError(f"cell {name!r}: {error}") from None
        return Cell(name, setting, config, labels)


def _check_axes(axes: Sequence[Axis], changes: Mapping[str, Any]) -> None:
    """Refuses axes that change one field twice, or are called the same."""
    paths = [*changes, *(path for axis in axes for path in axis.paths)]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ConfigError(f"two axes change {twice[0]!r}")
    titles = [title for axis in axes for title in axis.titles]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ConfigError(f"two axes are called {twice[0]!r}")
