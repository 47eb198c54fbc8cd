"""The search: a front of speed and fidelity on some prompts, judged on others, and the point that meets a target."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.files.prompts import NamedPrompt
from lazyllm.policies.schedules.tuned import Measured, Tuned, TunedFile
from lazyllm.tuning.fidelity import Fidelity, Reference
from lazyllm.tuning.prompts import split
from lazyllm.tuning.space import RULES, Space

NAME = "lazyllm tune"
VERSION = 1
"""Of what a study's parameters mean."""

OnProgress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class Target:
    """What to reach on the training prompts; one of the two.

    Attributes:
        speedup: at least this, and then the least divergence.
        max_loss: at most this divergence, and then the most speedup.

    Raises:
        InputError: when there is not exactly one, or it cannot be reached or missed.
    """

    speedup: float | None = None
    max_loss: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.max_loss is None):
            raise InputError("give one target: --speedup or --max-loss")
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise InputError(f"--speedup is a factor above 1, not {self.speedup}")
        if self.max_loss is not None and not 0 < self.max_loss < float("inf"):
            raise InputError(f"--max-loss is a divergence above 0, in nats per token, not {self.max_loss}")

    def is_met(self, measured: Measured) -> bool:
        """Whether a measured point reaches it."""
        if self.speedup is not None:
            return measured.speedup >= self.speedup
        return self.max_loss is not None and measured.divergence <= self.max_loss

    def choose(self, points: Sequence[Point]) -> Point | None:
        """Of the points that meet it, the best by the other value; None when none does."""
        meeting = [point for point in points if self.is_met(point.training)]
        return min(meeting, key=self._cost, default=None)

    def nearest(self, points: Sequence[Point]) -> Point:
        """The point that is nearest to it."""
        if self.speedup is not None:
            return max(points, key=lambda point: point.training.speedup)
        return min(points, key=lambda point: point.training.divergence)

    def to_dict(self) -> dict[str, float]:
        """What was given."""
        given = {"speedup": self.speedup, "max_loss": self.max_loss}
        return {name: value for name, value in given.items() if value is not None}

    def _cost(self, point: Point) -> float:
        return point.training.divergence if self.speedup is not None else -point.training.speedup


@dataclass(frozen=True)
class Point:
    """A configuration on the front.

    Attributes:
        number: of its trial.
        summary: its cuts and the scorer's fields, in a line.
        config: what was measured.
        training, validation: what it did.
    """

    number: int
    summary: str
    config: LazyConfig
    training: Measured
    validation: Measured


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        target: what was asked for.
        trials: how many configurations were measured.
        front: those that none beats in both speed and fidelity on the training prompts, slowest first.
        chosen: the one that meets the target, None when none does.
        files: what was written, `tuned.json` and `tuned.yaml`; none where nothing was chosen.
    """

    target: Target
    trials: int
    front: tuple[Point, ...]
    chosen: Point | None
    files: tuple[Path, ...] = ()

    @property
    def nearest(self) -> Point:
        """The point of the front nearest to the target."""
        return self.target.nearest(self.front)

    @property
    def validates(self) -> bool:
        """Whether the chosen point meets the target on the validation prompts too."""
        return self.chosen is not None and self.target.is_met(self.chosen.validation)


def tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[NamedPrompt],
    target: Target,
    *,
    out: str | Path,
    base: LazyConfig | None = None,
    rules: Sequence[str] = RULES,
    trials: int = 25,
    new_tokens: int = 16,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Outcome:
    """Searches schedules for a model; a search that was cut off goes on where it stopped.

    Args:
        model, tokenizer: the model.
        prompts: what to tune on; a third of them only validates.
        target: what to reach.
        out: folder of the study, of the dense model's replies and of the result.
        base: cache, protected tokens and scorer; the preset `recommended` unless given. Its schedule is not used.
        rules: how a cut may say what it keeps, of `RULES`.
        trials: how many configurations to measure, those of an earlier call included.
        new_tokens: how many tokens of each of the dense model's replies to compare.
        seed: of the split and of the search.
        on_progress: told how far it is.

    Raises:
        InputError: when the prompts cannot be used, or the folder holds a study of something else.
        PolicyError: when a share is tried of scores that may be negative.
    """
    tell = on_progress or (lambda phase, done, total: None)
    base = base or LazyConfig.preset("recommended")
    out = Path(out)
    training, validation = split(prompts, seed)
    fidelity = Fidelity(model, tokenizer, out / "references", new_tokens=new_tokens)
    space = Space(base, len(fidelity.contract.layers), rules)
    with _quiet(), _readable(out / "study.log") as file:
        study = _open(file, _identity(fidelity, space, prompts, seed))
        known = _references(fidelity, [*training, *validation], tell)
        _search(study, space, fidelity, known[: len(training)], trials, seed, tell)
        front = _validated(study, space, fidelity, known, len(training), tell)
        chosen = target.choose(front)
        files = _write(out, chosen, target, fidelity) if chosen else ()
    return Outcome(target, len(_complete(study)), front, chosen, files)


def _identity(fidelity: Fidelity, space: Space, prompts: Sequence[NamedPrompt], seed: int) -> dict[str, Any]:
    """By what a study must not differ from an earlier one that it goes on with, a short value."""
    base = space.base.to_dict()
    del base["schedule"]
    searched = {name: distribution_to_json(known) for name, known in space.distributions.items()}
    return {
        "format": VERSION,
        "model": fidelity.fingerprint,
        "prompts": _digest([fidelity.token_ids(prompt) for prompt in prompts]),
        "number of new tokens": fidelity.new_tokens,
        "seed": seed,
        "scorer, cache or protected tokens": _digest(base),
        "search space": _digest([space.layers, space.ladders, searched]),
    }


def _digest(value: Any) -> str:
    return blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what optuna logs about every trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _readable(file: Path) -> Iterator[Path]:
    """The study's file, without a last line that was cut off in the middle.

    Raises:
        InputError: when it cannot be read or written, or is no study.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.read_bytes() if file.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]
        cut_off = written[len(whole) :]
        if not all(map(_is_entry, whole.splitlines())) or cut_off[:1] not in (b"", b"{"):
            raise InputError(f"{str(file)!r} holds no study")
        if cut_off:
            file.write_bytes(whole)
        yield file
    except OSError as error:
        raise InputError(f"cannot use the folder {str(file.parent)!r}: {error.strerror}") from None


def _is_entry(line: bytes) -> bool:
    """Whether a line is one of a study's file."""
    try:
        entry = json.loads(line)
    except ValueError:
        return False
    return isinstance(entry, dict) and "op_code" in entry


def _open(file: Path, identity: Mapping[str, Any]) -> optuna.Study:
    """The study in a file, new or to go on with.

    Raises:
        InputError: when it is of something else.
    """
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        if NAME in optuna.get_all_study_names(storage):
            study = optuna.load_study(study_name=NAME, storage=storage)
        else:
            study = optuna.create_study(study_name=NAME, storage=storage, directions=["minimize", "maximize"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} holds no study that can be read: {error}") from None
    earlier = study.user_attrs.get("identity")
    if earlier is None:
        study.set_user_attr("identity", dict(identity))
    elif other := [name for name, value in identity.items() if earlier.get(name) != value]:
        raise InputError(
            f"the study in {str(file)!r} is of something else: it differs in {', '.join(other)}; "
            "take another folder, or delete this one to begin anew"
        )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # what a killed run left
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _references(fidelity: Fidelity, prompts: Sequence[NamedPrompt], tell: OnProgress) -> list[Reference]:
    known = []
    for index, prompt in enumerate(prompts):
        tell("dense replies", index, len(prompts))
        known.append(fidelity.reference(prompt))
    tell("dense replies", len(prompts), len(prompts))
    return known


def _search(
    study: optuna.Study,
    space: Space,
    fidelity: Fidelity,
    references: Sequence[Reference],
    trials: int,
    seed: int,
    tell: OnProgress,
) -> None:
    """Measures configurations until there are `trials`.

    Each is drawn with a sampler of its own, seeded by how many there are before, so that a study which was cut off
    draws what it would have drawn otherwise.
    """
    starts = space.starts
    while (count := len(_complete(study))) < trials:
        tell("trials", count, trials)
        if count < len(starts):
            measured = fidelity.measure(space.config(starts[count]), references)
            found = create_trial(params=starts[count], distributions=space.distributions, values=_objectives(measured))
            study.add_trial(found)
            continue
        study.sampler = TPESampler(seed=random.Random(f"{seed} {count}").getrandbits(32))
        trial = study.ask(fixed_distributions=space.distributions)
        measured = fidelity.measure(space.config(trial.params), references)
        study.tell(trial, _objectives(measured))
    tell("trials", count, trials)


def _objectives(measured: Measured) -> list[float]:
    return [measured.divergence, measured.speedup]


def _measured(objectives: Sequence[float], prompts: int) -> Measured:
    divergence, speedup = objectives
    return Measured(prompts=prompts, divergence=divergence, speedup=speedup)


def _validated(
    study: optuna.Study,
    space: Space,
    fidelity: Fidelity,
    references: Sequence[Reference],
    training: int,
    tell: OnProgress,
) -> tuple[Point, ...]:
    """The front, slowest first, measured on the references behind the first `training` too."""
    held_back = references[training:]
    best = _front(study)
    points = []
    for index, trial in enumerate(best):
        tell("validation", index, len(best))
        config = space.config(trial.params)
        key = f"validation of trial {trial.number}"
        if (objectives := study.user_attrs.get(key)) is None:
            objectives = _objectives(fidelity.measure(config, held_back))
            study.set_user_attr(key, objectives)
        on_training = _measured(trial.values, training)
        on_validation = _measured(objectives, len(held_back))
        points.append(Point(trial.number, space.summary(trial.params), config, on_training, on_validation))
    tell("validation", len(best), len(best))
    return tuple(points)


def _front(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that none beats in both values, slowest first; of equal ones the first."""
    unique: dict[tuple[float, ...], FrozenTrial] = {}
    for trial in sorted(study.best_trials, key=lambda trial: trial.number):
        unique.setdefault(tuple(trial.values), trial)
    return sorted(unique.values(), key=lambda trial: trial.values[1])


def _write(out: Path, chosen: Point, target: Target, fidelity: Fidelity) -> tuple[Path, Path]:
    """`tuned.json`, and the configuration that names it by its absolute path, so that it loads from anywhere."""
    file = TunedFile(
        fingerprint=fidelity.fingerprint,
        schedule=chosen.config.schedule,
        scorer=chosen.config.scorer,
        target=target.to_dict(),
        new_tokens=fidelity.new_tokens,
        training=chosen.training,
        validation=chosen.validation,
    )
    path = file.save(out / "tuned.json")
    config = LazyConfig(**{**dict(chosen.config), "schedule": Tuned(path=str(path.resolve()))})
    return path, config.save(out / "tuned.yaml")
