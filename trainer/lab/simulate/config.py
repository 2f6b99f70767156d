"""What can be set in a simulation? The groups `balance` and `scores` are chosen as in training."""

import difflib
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from trainer.config import CONFIG_DIR, BalanceConfig, ConfigError, GuardConfig, composed

ARMS = sorted(path.stem for path in (CONFIG_DIR / "balance").glob("*.yaml"))


@dataclass(kw_only=True)
class Thresholds:
    """What `ci=true` demands besides that no expert collapses; null: nothing."""

    # [even shares] of MaxVio over its floor, mean over the last fifth of the steps
    excess_mean: float | None = None
    # until MaxVio, mean of 10 steps, is below `balanced_below`; counted to the first of the 10 steps
    steps_to_balance: int | None = None
    recovery_steps: int | None = None  # the same after the shift of the scores


@dataclass(kw_only=True)
class SimulateConfig:
    name: str | None = None  # of the directory <run_dir>/<name>; null: after level and rule
    run_dir: str = "runs"
    level: Any = MISSING  # _target_: frozen | closed | tiny | replay (trainer/lab/simulate/levels.py)
    layers: int = 2  # M
    experts: int = 256  # E
    top_k: int = 4  # K
    tokens: int = 4096  # T, of a step
    steps: int = 1000
    seed: int = 0
    seeds: int = 1  # runs with seed, seed + 1, ...
    compare: Any = None  # all, or a list of arms: [smebu,sign]
    workers: int | None = None  # runs side by side; null: one for each core
    ep: int = 8  # expert-parallel ranks, for the load of the busiest one
    balanced_below: float = 0.6  # [even shares] MaxVio, mean of 10 steps
    ci: bool = False  # exit code 3 if an expert collapsed or a threshold is missed
    thresholds: Thresholds = field(default_factory=Thresholds)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    scores: Any = None  # _target_: the logits of frozen and closed (trainer/lab/simulate/scores.py)

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) / str(self.name)


ConfigStore.instance().store(name="simulate_schema", node=SimulateConfig)


def load(overrides: list[str]) -> SimulateConfig:
    """Composes configs/simulate.yaml and checks every value. Raises: ConfigError."""
    config = composed("simulate", overrides)
    assert isinstance(config, SimulateConfig)
    _check(config)
    if config.name is None:
        level = str(config.level["_target_"]).rsplit(".", 1)[-1].lower()
        config.name = f"simulate-{level}-{'compare' if config.compare else config.balance.name}"
    return config


def arms(config: SimulateConfig, overrides: list[str]) -> list[SimulateConfig]:
    """One configuration for each arm that is compared; all else is alike."""
    if not config.compare:
        return [config]
    names = ARMS if config.compare == "all" else list(config.compare)
    keys = {override: override.split("=")[0].lstrip("+~") for override in overrides}
    rules = [override for override, key in keys.items() if key == "balance" or key.startswith("balance.rule")]
    if rules:
        raise ConfigError(f"{rules[0]} with compare=: each arm brings its own rule; leave it out")
    for name in names:
        if name not in ARMS:
            near = difflib.get_close_matches(str(name), ARMS, n=3) or ARMS
            raise ConfigError(
                f"compare: there is no configs/balance/{name}.yaml (did you mean {', '.join(near)}?)"
            )
    return [replace(load([*overrides, f"balance={name}"]), name=config.name) for name in dict.fromkeys(names)]


def _check(c: SimulateConfig) -> None:
    at_least = {
        "layers": 1,
        "experts": 1,
        "top_k": 1,
        "tokens": 1,
        "steps": 1,
        "seed": 0,
        "seeds": 1,
        "ep": 1,
    }
    for key, limit in at_least.items():
        if (value := getattr(c, key)) < limit:
            raise ConfigError(f"{key}={value}: must be at least {limit}")
    if c.workers is not None and c.workers < 1:
        raise ConfigError(f"workers={c.workers}: must be at least 1, or null for one per core")
    if c.top_k > c.experts:
        raise ConfigError(f"top_k={c.top_k} exceeds experts={c.experts}")
    if c.experts % c.ep:
        choices = [n for n in range(1, min(c.experts, 64) + 1) if c.experts % n == 0]
        raise ConfigError(f"ep={c.ep} does not divide experts={c.experts}; use one of {choices}")
    if not 0 < c.balanced_below < math.inf:
        raise ConfigError(f"balanced_below={c.balanced_below}: must be above 0 and finite")
    not_negative = {
        f"balance.{name}": value for name, value in vars(c.balance).items() if name.endswith("loss_weight")
    }
    for key, value in not_negative.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"{key}={value}: must be 0 or more")
    of_training = {
        "balance.trace": c.balance.trace,
        "balance.trace_required": c.balance.trace_required,
        "guard.stop": c.guard.stop,
    }
    for key, value in of_training.items():
        if value:
            raise ConfigError(
                f"{key}={value}: is for training runs, a simulation has no use for it; leave it out"
            )
    for name, value in vars(c.thresholds).items():
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"thresholds.{name}={value}: must be a finite number, or null for none")
    if c.compare and c.compare != "all" and not (isinstance(c.compare, list) and c.compare):
        raise ConfigError(f"compare={c.compare}: must be all or a list of arms, compare=[smebu,sign]")
    if c.name is not None and (not c.name or Path(c.name).name != c.name or c.name in (".", "..")):
        raise ConfigError(f"name={c.name!r}: must be one plain directory name, without / or ..")
