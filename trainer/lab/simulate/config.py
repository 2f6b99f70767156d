"""What can be set in a simulation? The groups `balance` and `scores` are chosen as in training."""

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from trainer.config import (
    CONFIG_DIR,
    BalanceConfig,
    ConfigError,
    GuardConfig,
    check_name,
    check_values,
    composed,
    number,
    path,
)
from trainer.run.memory import GIB, room_on

COUNT = {"at_least": 0, "at_most": 10**9, "why": "no simulation has as many steps"}
STEPS = COUNT | {"at_least": 1}
LOGITS = 8  # [bytes] of a token and expert: its logit and noise
ARMS = sorted(path.stem for path in (CONFIG_DIR / "balance").glob("*.yaml"))


@dataclass(kw_only=True)
class Thresholds:
    """What `ci=true` demands besides that no expert collapses; null: nothing."""

    # [even shares] of MaxVio over its floor, mean over the last fifth of the steps
    excess_mean: float | None = number(None, at_least=-1e6, at_most=1e6, why="the busiest expert has no more")
    # until MaxVio, mean of 10 steps, is below `balanced_below`; counted to the first of the 10 steps
    steps_to_balance: int | None = number(None, **COUNT)
    recovery_steps: int | None = number(None, **COUNT)  # the same after the shift of the scores


@dataclass(kw_only=True)
class SimulateConfig:
    name: str | None = path(None)  # of the directory <run_dir>/<name>; null: after level and rule
    run_dir: str = path("runs")
    level: Any = MISSING  # _target_: frozen | closed | tiny | replay (trainer/lab/simulate/levels.py)
    layers: int = number(2, at_least=1, at_most=4096, why="30 times the deepest published model")  # M
    experts: int = number(256, at_least=1, at_most=65_536, why="a model may have no more")  # E
    top_k: int = number(4, at_least=1, at_most=65_536, why="a model may have no more experts")  # K
    tokens: int = number(4096, at_least=1, at_most=2**24, why="a step keeps logits of each")  # T, of a step
    steps: int = number(1000, **STEPS)
    seed: int = number(0, at_least=0, at_most=2**63 - 1, why="generators take 63 bits")
    # runs with seed, seed + 1, ...
    seeds: int = number(1, at_least=1, at_most=10_000, why="each run keeps its curves")
    compare: Any = None  # all, or a list of arms: [smebu,sign]
    # runs side by side; null: one for each core
    workers: int | None = number(None, at_least=1, at_most=1024, why="a process each")
    # expert-parallel ranks, for the load of the busiest one
    ep: int = number(8, at_least=1, at_most=65_536, why="a rank has an expert at least")
    # [even shares] MaxVio, mean of 10 steps
    balanced_below: float = number(0.6, above=0.0, at_most=1e6, why="everything is balanced")
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
    check_values(c)
    if c.top_k > c.experts:
        raise ConfigError(f"top_k={c.top_k} exceeds experts={c.experts}")
    if c.experts % c.ep:
        choices = [n for n in range(1, min(c.experts, 64) + 1) if c.experts % n == 0]
        raise ConfigError(f"ep={c.ep} does not divide experts={c.experts}; use one of {choices}")
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
    if c.compare not in (None, "all") and not (isinstance(c.compare, list) and c.compare):
        raise ConfigError(f"compare={c.compare}: must be all or a list of arms, compare=[smebu,sign]")
    if c.name is not None:
        check_name("name", c.name)
    _check_room(c)


def _check_room(c: SimulateConfig) -> None:
    """Of the logits of one step, which are most of what a simulation keeps."""
    needed, room = LOGITS * c.tokens * c.experts, room_on(torch.device("cpu"))
    if needed > room.num_bytes:
        raise ConfigError(
            f"tokens={c.tokens} x experts={c.experts}: the logits of a step would take "
            f"{needed / GIB:,.1f} GiB, but {room.where} {room.num_bytes / GIB:,.1f} GiB; use fewer"
        )
