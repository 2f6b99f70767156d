"""One simulation: every arm and seed on the same scores, side by side, and what became of the experts."""

import gc
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from hydra.utils import instantiate

from trainer import train
from trainer.lab.intervals import estimate
from trainer.lab.simulate.config import SimulateConfig, load
from trainer.lab.simulate.history import History
from trainer.ranks import device

__all__ = ["load", "simulate"]

RANKED_BY = "excess_run"


def simulate(
    config: SimulateConfig, *, arms: list[SimulateConfig] | None = None, command: str = ""
) -> dict[str, Any]:
    """Runs arms x seeds and returns what simulation.json holds. Raises: ConfigError before the first step."""
    arms = arms or [config]
    start_s = time.perf_counter()
    device.keep_freed_memory()
    jobs = [(arm, seed) for arm in arms for seed in range(config.seed, config.seed + config.seeds)]
    for arm in arms:
        build_level(arm, config.seed).close()  # what any of them refuses is refused now
    workers = min(len(jobs), config.workers or len(os.sched_getaffinity(0)))
    first = arms[0]  # a trace has set its shape
    with progress(len(jobs) * first.steps) as advance:
        runs = (
            [run_one(*job, advance) for job in jobs]
            if workers == 1
            else run_side_by_side(jobs, workers, advance)
        )
    failures = [failure for run in runs for failure in failures_of(run, config)]
    [shift_step] = {run.pop("shift_step") for run in runs}
    shown = ("layers", "experts", "top_k", "tokens", "steps", "seed", "seeds", "ep", "balanced_below")
    return {
        "format": "triquetra-simulation",
        "version": 1,
        "command": command,
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start_s, 1),
        "config": {
            "level": level_name(config),
            "scores": config.scores if level_name(config) in ("frozen", "closed") else None,
            **{key: getattr(first, key) for key in shown},
            "shift_step": shift_step,
        },
        "notes": sorted({note for run in runs for note in run.pop("notes")}),
        "runs": runs,
        "ranking": ranking(runs) if len(arms) > 1 else None,
        "thresholds": vars(config.thresholds),
        "failures": failures,
    }


def level_name(config: SimulateConfig) -> str:
    return str(config.level["_target_"]).rsplit(".", 1)[-1].lower()


def build_level(config: SimulateConfig, seed: int) -> Any:
    with train.refusing():
        return instantiate(config.level)(config=config, seed=seed)


def run_one(config: SimulateConfig, seed: int, advance: Callable[[], None]) -> dict[str, Any]:
    start_s = time.perf_counter()
    level = build_level(config, seed)
    try:
        history = History(level, steps=config.steps, ep=config.ep, balanced_below=config.balanced_below)
        for step in range(1, config.steps + 1):
            history.add(step, level.step(step))
            advance()
        verdict = level.balancer.verdict()
    finally:
        level.close()
    return {
        "arm": config.balance.name,
        "seed": seed,
        "ok": verdict.ok,
        "too_short": None if verdict.is_known else str(verdict),
        "collapsed": len(verdict.collapsed),
        "experts": verdict.num_experts,
        "seconds": round(time.perf_counter() - start_s, 1),
        **history.as_dict(with_loads=seed == config.seed),
        "notes": level.notes,
        "shift_step": level.shift_step,
    }


_counter: Any = None  # shared by the workers: steps done


def _share(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def _count_one() -> None:
    with _counter.get_lock():
        _counter.value += 1


def _run_in_worker(job: tuple[SimulateConfig, int]) -> dict[str, Any]:
    return run_one(*job, _count_one)


def run_side_by_side(jobs: list, workers: int, advance: Callable[[int], None]) -> list[dict[str, Any]]:
    """Forked workers of one thread each: the imports are done once."""
    # a process group left in a cycle would be taken down in a worker, which hangs without the group's threads
    gc.collect()
    context = multiprocessing.get_context("fork")
    counter, shown = context.Value("q", 0), 0
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_share, initargs=(counter,)) as pool:
        futures = [pool.submit(_run_in_worker, job) for job in jobs]
        try:
            while not all(future.done() for future in futures):
                time.sleep(0.1)
                advance(counter.value - shown)
                shown = counter.value
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def progress(num_steps: int) -> Iterator[Callable[..., None]]:
    """A bar over the steps of all runs; nothing where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("simulating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=num_steps)
        yield lambda steps=1: bar.advance(task, steps)


def failures_of(run: dict[str, Any], config: SimulateConfig) -> list[str]:
    who = f"{run['arm']} seed {run['seed']}"
    failures = (
        [f"{who}: {run['collapsed']} of {run['experts']} experts collapsed"] if run["collapsed"] else []
    )
    for name, limit in vars(config.thresholds).items():
        value = run["summary"].get(name)
        if limit is not None and (value is None or not value <= limit):
            failures.append(
                f"{who}: {name} is {'never reached' if value is None else f'{value:.4g}'}, the limit is "
                f"{limit:g}"
            )
    return failures


def ranking(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Fewest collapsed runs first, then the smallest excess of MaxVio over its floor, mean over the whole
    run.
    """
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        arm_runs = [run for run in runs if run["arm"] == arm]
        metrics = {}
        for name in dict.fromkeys(key for run in arm_runs for key in run["summary"]):
            values = [run["summary"][name] for run in arm_runs if run["summary"].get(name) is not None]
            interval = estimate(values)
            metrics[name] = (
                interval.as_dict() if interval else {"mean": None, "low": None, "high": None, "num_seeds": 0}
            )
        collapsed = sum(not run["ok"] for run in arm_runs)
        rows.append({"arm": arm, "num_seeds": len(arm_runs), "collapsed_runs": collapsed, "metrics": metrics})
    rows.sort(key=lambda row: (row["collapsed_runs"], row["metrics"][RANKED_BY]["mean"]))
    return [{"rank": rank, **row} for rank, row in enumerate(rows, start=1)]
