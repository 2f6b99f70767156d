"""Evaluations of a run's kept checkpoints, or of exported weights.

    triquetra evaluate runs/demo                              what its configuration names, newest checkpoint
    triquetra evaluate runs/demo 100 200 evaluate=held_out    these steps
    triquetra evaluate runs/demo all 'evaluate.x={_target_: trainer.evaluate.Task, path: x.jsonl}'
    triquetra evaluate out 'evaluate.x={...}'                 a directory that `triquetra export` has made
    triquetra evaluate out --harness arc_easy,mine --include-path tasks     its tasks by lm-evaluation-harness
    torchrun --nproc-per-node 4 -m trainer.evaluate runs/demo parallel=fsdp

Settings are the run's own, with overrides. Results of a run go into its evaluations.jsonl, unless the run is
training just now. Exit codes: 0 done · 1 a checkpoint is damaged · 2 refused · 4 data cannot be read.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer import terminal
from trainer.checkpoint import Checkpoints, DamagedError, Found
from trainer.config import Config, ConfigError, load, reread
from trainer.data import BadDocument, DataError
from trainer.evaluate.harness import lines_of, run_harness
from trainer.evaluate.start import results_before, start_evaluations
from trainer.metrics import EVALUATIONS, scalars
from trainer.model.hf import KEYS
from trainer.ranks.lock import InUseError, lock
from trainer.ranks.stop import INTERRUPTED, NO_DATA, OK, REFUSED, StopRequest
from trainer.records import write_text
from trainer.run.build import build, refusing
from trainer.run.saving import load_checkpoint
from trainer.run.state import Run
from trainer.weights.export import OneLineParser
from trainer.weights.pretrained import start_from

DAMAGED = 1
CODES = {
    DamagedError: DAMAGED,
    BadDocument: NO_DATA,
    DataError: NO_DATA,
    ConfigError: REFUSED,
    OSError: REFUSED,
    KeyboardInterrupt: INTERRUPTED,
}
UNUSED = ("optimizer", "window", "health", "stream")  # parts of a checkpoint


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return terminal.run(partial(command, words), CODES)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def command(words: list[str]) -> int:
    if not words or {"-h", "--help"} & set(words):
        print(__doc__.rstrip())
        return OK if words else REFUSED
    options = parsed(words)
    directory, overrides = options.path, [word for word in options.words if "=" in word]
    steps = [word for word in options.words if "=" not in word]
    if options.harness is not None:
        return of_harness(options)
    with StopRequest() as stop, tempfile.TemporaryDirectory() as scratch:
        if (directory / "checkpoints").is_dir():
            return of_run(directory, steps, overrides, stop=stop)
        if (directory / "config.json").is_file():
            return of_export(directory, steps, overrides, scratch=scratch, stop=stop)
    raise ConfigError(f"{directory}: is neither a run's directory nor one that `triquetra export` has made")


def parsed(words: list[str]) -> argparse.Namespace:
    """Raises: ConfigError."""
    parser = OneLineParser(prog="triquetra evaluate", add_help=False, allow_abbrev=False)
    parser.add_argument("path", type=terminal.path)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--harness", metavar="TASK[,TASK]")
    parser.add_argument("--include-path", metavar="DIR", type=terminal.path)
    options = parser.parse_intermixed_args(words)
    if options.include_path is not None and options.harness is None:
        parser.error("--include-path: is where --harness=TASK finds tasks of yours; give both")
    return options


def of_harness(options: argparse.Namespace) -> int:
    if options.words:
        unread = " ".join(options.words)
        raise ConfigError(f"--harness: has no steps or settings of ours; leave out {unread}")
    tasks = [task for task in options.harness.split(",") if task]
    results = run_harness(options.path, tasks, include_path=options.include_path)
    print("\n".join(lines_of(results)), flush=True)
    return OK


def of_run(directory: Path, steps: Sequence[str], overrides: list[str], *, stop: StopRequest) -> int:
    config = reread(directory / "config.yaml", ["data.workers=0", *overrides])
    config.run_dir, config.name = str(directory.parent), directory.name
    if (directory / "tokenizer.json").is_file():
        config.data.tokenizer = str(directory / "tokenizer.json")
    checkpoints = Checkpoints(directory / "checkpoints")
    chosen = chosen_steps(checkpoints, steps)
    run = started(config, stop=stop)
    for step in chosen:
        with refusing():
            load_checkpoint(run, Found(step, checkpoints.path(step)), without=UNUSED)
        results = made(run)
        if dist.get_rank() == 0:
            record(directory, results)
    return run.stop.agreed or OK


def chosen_steps(checkpoints: Checkpoints, steps: Sequence[str]) -> list[int]:
    """Raises: ConfigError, DamagedError."""
    kept = checkpoints.steps()
    if not kept:
        raise ConfigError(f"{checkpoints.directory}: holds no checkpoint yet")
    names = ", ".join(map(str, kept))
    for step in steps:
        if step != "all" and not (step.isdecimal() and int(step) in kept):
            raise ConfigError(f"step {step}: the run has checkpoints of steps {names}; or all")
    return kept if "all" in steps else sorted({int(step) for step in steps}) or kept[-1:]


def of_export(
    directory: Path, steps: Sequence[str], overrides: list[str], *, scratch: str, stop: StopRequest
) -> int:
    if steps:
        raise ConfigError(f"{directory}: has no steps, it was exported from one; leave out {' '.join(steps)}")
    run = exported(directory, overrides, scratch=scratch, stop=stop)
    made(run)
    return run.stop.agreed or OK


def exported(directory: Path, overrides: list[str], *, scratch: str, stop: StopRequest) -> Run:
    """A run that has the weights of an export, and its evaluations. Raises: ConfigError."""
    shape = json.loads((directory / "config.json").read_text())
    model = [f"model.{ours}={shape[theirs]}" for ours, theirs in KEYS.items() if theirs in shape]
    files = [f"init_from={directory}", f"name={directory.name}", f"run_dir={scratch}", "data.workers=0"]
    rows = ["seq_len=512", "global_batch=8", "micro_batch=1", "steps=1"]
    if (directory / "tokenizer.json").is_file():
        files.append(f"data.tokenizer={directory / 'tokenizer.json'}")
    config = load([*model, *files, *rows, *overrides])
    run = started(config, stop=stop)
    with refusing():
        run.load_state_dict(start_from(config, run.state_dict(["model"]), run.stream.tokenizer))
    return run


def started(config: Config, *, stop: StopRequest) -> Run:
    """Raises: ConfigError."""
    if not config.evaluate:
        raise ConfigError(
            "evaluate: names nothing to evaluate; add evaluate=held_out or evaluate.<name>={...}"
        )
    run = build(config, stop=stop)
    start_evaluations(run)
    return run


def made(run: Run) -> list[dict[str, Any]]:
    """All of its evaluations, of the weights that it has now."""
    results = list[dict[str, Any]]()
    run.evaluations.results.clear()
    run.evaluations.make(run, list(run.evaluations.named), report=results.append)
    for result in results if dist.get_rank() == 0 else ():
        numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in scalars(result).items())
        print(f"step {result['step']}  {result['evaluation']}: {numbers}", flush=True)
    return results


def record(directory: Path, results: list[dict[str, Any]]) -> None:
    """Puts the results into the run's file, at their steps, in place of earlier ones."""
    path = directory / EVALUATIONS
    try:
        held = lock(directory, wait_s=0)
    except InUseError as error:
        print(f"not recorded: {error}", file=sys.stderr)
        return
    with held:
        lines = results_before(path, step=sys.maxsize)
        made = {(result["step"], result["evaluation"]) for result in results}
        lines = [line for line in lines if (line["step"], line["evaluation"]) not in made] + results
        lines.sort(key=lambda line: line["step"])
        write_text(path, "".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
