"""What is a study? One YAML file: arms x seeds of one program, and what to measure.

program: train                                 # train | simulate
question: What does the rule add to the loss?  # one sentence, printed over the tables
seeds: 3                                       # every arm runs with seeds 0, 1, 2
base: [experiment=demo, steps=300]             # overrides of all arms
arms:                                          # each a list of overrides; may be empty
  all_on: []
  no_smebu: [balance=sign]
reference: all_on                              # the others are compared with it, seed by seed
metrics:
  loss: {of: loss}                             # mean over the last 10 % of the steps
  excess: {of: balance/max_violation, minus: balance/floor}
  noise: {of: loss, take: spread, over: 0.5}   # standard deviation around the best line
  steps_to_5: {of: loss, take: first_below, level: 5.0}
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf

from trainer.config import CONFIG_DIR, ConfigError, filled, nearest
from trainer.run.directory import dotted_keys

TAKES = ("mean", "spread", "lag_1", "max", "min", "last", "first_below", "first_above")
# change no number
NEUTRAL = ("name", "run_dir", "timeout_s", "data.cache_dir", "logging.", "checkpoint.", "workers")
OURS = ("seed", "name", "run_dir")  # set for each job by the engine


@dataclass(kw_only=True)
class Metric:
    """One number of a finished job."""

    of: str = MISSING  # train: a key of metrics.jsonl; simulate: a key of the summary
    minus: str | None = None  # another key, subtracted step by step
    # mean | spread | lag_1 | max | min | last | first_below | first_above (the first step, maybe never)
    take: str = "mean"
    # around the line of best fit, spread: standard deviation; lag_1: correlation of neighbouring steps
    over: float | None = None  # the last share of the steps; null: 0.1 for a mean, else 1
    level: float | None = None  # of first_below and first_above

    @property
    def share(self) -> float:
        return self.over if self.over is not None else 0.1 if self.take == "mean" else 1.0


@dataclass(kw_only=True)
class Study:
    program: str = "train"
    question: str = MISSING
    seeds: int = 3
    base: list[str] = field(default_factory=list)
    arms: dict[str, list[str]] = MISSING
    reference: str = MISSING
    metrics: dict[str, Metric] = MISSING


@dataclass(kw_only=True)
class Job:
    """One arm with one seed."""

    arm: str
    seed: int
    overrides: list[str]
    config: Any  # of the program: a checked dataclass
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.arm}-s{self.seed}"


def study_path(name: str) -> Path:
    """The file of a study that is named, or given as a path."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    return CONFIG_DIR / "ablation" / f"{name}.yaml"


def load_study(name: str) -> Study:
    """Raises: ConfigError."""
    path = study_path(name)
    if not path.is_file():
        studies = sorted(p.stem for p in (CONFIG_DIR / "ablation").glob("*.yaml"))
        raise ConfigError(
            f"study={name}: there is no {path}{nearest(name, studies)}; a path that ends in .yaml works too"
        )
    return checked(filled(Study, path))


def checked(study: Study) -> Study:
    if study.program not in ("train", "simulate"):
        raise ConfigError(f"program={study.program}: must be train or simulate")
    if study.seeds < 1:
        raise ConfigError(f"seeds={study.seeds}: must be at least 1")
    if not study.arms or not study.metrics:
        raise ConfigError("a study needs at least one arm and one metric")
    for arm in study.arms:
        if not re.fullmatch(r"\w[\w.-]*", arm):
            raise ConfigError(f"arms.{arm}: must be a plain directory name of letters, digits, _, - and .")
    if study.reference not in study.arms:
        raise ConfigError(
            f"reference={study.reference}: is no arm{nearest(study.reference, list(study.arms))}"
        )
    for name, m in study.metrics.items():
        if m.take not in TAKES:
            raise ConfigError(
                f"metrics.{name}.take={m.take}: must be one of "
                f"{', '.join(TAKES)}{nearest(m.take, list(TAKES))}"
            )
        if not 0 < m.share <= 1:
            raise ConfigError(f"metrics.{name}.over={m.over}: a share of the steps, above 0 and at most 1")
        if m.take.startswith("first_") != (m.level is not None):
            raise ConfigError(
                f"metrics.{name}: level= is for take=first_below and first_above, and they need it"
            )
        if study.program == "simulate" and m.take != "mean":
            raise ConfigError(
                f"metrics.{name}.take={m.take}: a simulation's summary has one number a key, leave take= out"
            )
    return study


def jobs_of(study: Study, program: Any, directory: Path) -> list[Job]:
    """All jobs, seed by seed so that an unfinished study can be compared; every configuration loaded and
    checked.
    """
    jobs = []
    for seed in range(study.seeds):
        for arm, changes in study.arms.items():
            overrides = [*study.base, *changes]
            for override in overrides:
                if override.split("=")[0].lstrip("+~") in OURS:
                    raise ConfigError(
                        f"arm {arm}: {override!r}: {', '.join(OURS)} are set for each job; see seeds= and "
                        "run_dir="
                    )
            name = f"{arm}-s{seed}"
            try:
                config = program.load([*overrides, f"seed={seed}", f"name={name}", f"run_dir={directory}"])
            except ConfigError as error:
                raise ConfigError(f"arm {arm}: {error}") from None
            jobs.append(
                Job(arm=arm, seed=seed, overrides=overrides, config=config, directory=directory / name)
            )
    first = [job for job in jobs if job.seed == 0]
    for i, job in enumerate(first):
        for other in first[:i]:
            if not differences(settings(job.config), settings(other.config)):
                raise ConfigError(
                    f"arms {other.arm} and {job.arm} resolve to the same configuration: they would "
                    "compare nothing"
                )
    return jobs


def settings(config: Any) -> dict[str, Any]:
    """Every value of a configuration that its numbers depend on, by its dotted key."""
    values = dotted_keys(OmegaConf.structured(config))
    return {key: value for key, value in values.items() if not key.startswith(NEUTRAL)}


def differences(
    before: dict[str, Any], now: dict[str, Any], defaults: dict[str, Any] | None = None
) -> list[str]:
    """Keys whose values differ. A key that is in `now` only and has its default is none: it is newer than
    `before`.
    """
    absent = object()
    new = {
        key
        for key in now
        if key not in before and key in (defaults or {}) and now[key] == (defaults or {})[key]
    }
    return sorted(key for key in {*before, *now} - new if before.get(key, absent) != now.get(key, absent))


def refuse_changed(job: Job, before: dict[str, Any]) -> None:
    """Raises: ConfigError if a job that was started has other settings now."""
    defaults = dotted_keys(OmegaConf.structured(type(job.config)))
    now = settings(job.config)
    if keys := differences(before, now, defaults):
        shown = ", ".join(
            f"{key}={before.get(key, '(none)')}, now {now.get(key, '(none)')}" for key in keys[:4]
        )
        more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
        raise ConfigError(
            f"arm {job.arm}: {job.directory} was run with {shown}{more}. Set it back; or delete "
            "that directory "
            f"to run it again; or choose another run_dir= for a new study"
        )
