"""A training run, from the command line to the verdict.

    python -m trainer.train experiment=demo
    torchrun --nproc-per-node 4 -m trainer.train experiment=demo parallel=hsdp_ep

Exit codes: 0 done and balanced · 2 refused configuration · 3 experts collapsed · 4 data cannot be read · 5
checkpoints cannot be written · 6 steps cannot be applied, or the guard ended it · 7 a rank hung · 75 told to
end (SIGTERM, SIGHUP and their like), saved · 130 Ctrl-C, saved.
"""

from trainer.ranks.launcher import end_with_launcher
from trainer.ranks.stop import StopRequest
from trainer.terminal import outlive_terminal

if __name__ == "__main__":  # the imports below take seconds
    outlive_terminal()  # before the pipe of StopRequest could take the number of a closed stdout
    end_with_launcher()
    StopRequest().__enter__()

import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from hydra.utils import instantiate

from trainer import terminal
from trainer.balance.trace import TraceWriter
from trainer.checkpoint import SaveError
from trainer.config import Config, ConfigError, load, looked_up
from trainer.data import BAD_KINDS, BadDocument, DataError, cache_path, chat_template_of
from trainer.evaluate import start_evaluations
from trainer.metrics import MetricsLog
from trainer.model.hf import export_problems
from trainer.ranks import device
from trainer.ranks.agree import end_if_told, refusing_on_all
from trainer.ranks.stop import (
    CANNOT_SAVE,
    COLLAPSED,
    INTERRUPTED,
    NO_DATA,
    OK,
    REFUSED,
    UNSOUND,
    Stopped,
)
from trainer.ranks.watchdog import Watchdog
from trainer.run.build import build, refusing
from trainer.run.directory import open_directory, record_start, record_verdict
from trainer.run.garbage import Garbage
from trainer.run.profile import Profile
from trainer.run.recover import leave_unread, resume, roll_back
from trainer.run.saving import finish_saving, save
from trainer.run.state import Run
from trainer.run.step import next_batches, train_step
from trainer.size import count_parameters
from trainer.weights.pretrained import refuse_early, start_from, weights_of_run

log = logging.getLogger(__name__)


class BetweenSteps(Protocol):
    """What is done besides training, where no step is under way."""

    def begin(self, step: int) -> None:
        """Before this step."""
        ...


def loop(
    run: Run,
    metrics: MetricsLog | None,
    watchdog: Watchdog,
    *,
    between: Sequence[BetweenSteps] = (),
    peak: float = math.inf,
) -> None:
    """Trains until the last step, or until some rank is told to stop; saves at intervals and at the end.

    peak [FLOP/s]: of all ranks, that MFU is measured against.
    """
    config = run.config
    evaluate(run, metrics, watchdog, at_start=True)
    start_s, shape = time.perf_counter(), None
    while run.step < run.last_step and run.stop.agreed is None:
        for other in between:
            other.begin(run.step + 1)
        now, before = run.program.settings_at(run.tokens), run.stream.snapshot()
        compiles = shape != (shape := (now.micro_batch, now.seq_len))
        watchdog.heartbeat(f"step {run.step + 1}", limit_s=config.timeout_s if compiles else None)
        if (batches := next_batches(run)) is None:
            if dist.get_rank() == 0:
                print(f"the corpus is at its end after step {run.step} of {run.last_step}")
            run.end_at(run.step)  # there is nothing left to train on
            save(run)
            break
        values = train_step(run, batches, waited_s=time.perf_counter() - start_s)
        if values is None:
            watchdog.heartbeat("saving", limit_s=config.timeout_s)
            leave_unread(run, before.state_dict())
        step_s = time.perf_counter() - start_s
        values["tokens_per_s"] = values["data/step_tokens"] / step_s
        values["mfu"] = values["data/step_flop"] / step_s / peak
        values |= device.memory(run.device)
        if metrics is not None:
            metrics.write(values, alarms=run.balancer.guard.take_alarms())
        if run.health.is_lost:
            watchdog.heartbeat("going back", limit_s=config.timeout_s)
            roll_back(run, metrics)
        else:
            evaluate(run, metrics, watchdog)
            if due(run):
                watchdog.heartbeat(f"saving step {run.step}", limit_s=config.timeout_s)
                save(run)
        start_s = time.perf_counter()
    watchdog.heartbeat("saving", limit_s=config.timeout_s)
    finish_saving(run)


def evaluate(run: Run, metrics: MetricsLog | None, watchdog: Watchdog, *, at_start: bool = False) -> None:
    """Makes the evaluations that are due. A run that is told to stop meanwhile has `stop.agreed` afterwards.

    Raises: Stopped if there is nothing to save then.
    """
    limit_s = run.config.timeout_s if run.config.compile else None
    was_made = run.evaluations.make(
        run,
        run.evaluations.due(run, at_start=at_start),
        report=metrics.write_evaluation if metrics is not None else lambda result: None,
        heartbeat=partial(watchdog.heartbeat, limit_s=limit_s),
    )
    if not was_made and run.step == 0:
        raise Stopped(run.stop.agreed)


def due(run: Run) -> bool:
    """Whether to write a checkpoint now. While steps are being skipped none is written, so the newest one is
    from before them.
    """
    at_interval = run.step % run.config.checkpoint.interval == 0
    is_wanted = (at_interval or run.step == run.checkpoints.best) and not run.health.in_row
    return is_wanted or run.step == run.last_step or run.stop.agreed is not None


# -- entry point ------------------------------------------------------------------------------------------


def start(config: Config, *, stop: StopRequest | None = None) -> Run:
    """The run on this rank, ready for its next step: the first, or where its newest checkpoint left it.

    Joins the process group, or makes one of this process. stop: what listens to signals; None: from here on
    the run does. Collective. Raises: ConfigError, SaveError, Stopped.
    """
    with ExitStack() as if_refused:
        stop = stop or if_refused.enter_context(StopRequest())
        run = _start(config, stop)
        if_refused.pop_all()  # the run goes on listening
    return run


def _start(config: Config, stop: StopRequest) -> Run:
    end_if_told(stop)
    refuse_early(config)
    run = build(config, stop=stop)
    config = run.config  # steps are counted by now
    end_if_told(stop)
    template = chat_template_of(reader.source for reader in run.stream.readers)
    of_data = {"tokenizer": run.stream.tokenizer, "chat_template": template}
    opened = open_directory(config, run.checkpoints, corpus=run.stream.fingerprint, **of_data)
    run.about, run.texts, run.held = opened.about, opened.texts, opened.held
    if opened.origin is not None and config.anew and run.checkpoints.last_saved is None:
        with refusing():
            weights = run.state_dict(["model"])
            run.load_state_dict(weights_of_run(config, weights, opened.origin.path, run.stream.tokenizer))
    elif opened.origin is not None:
        with refusing():
            resume(run, opened.origin)
    elif config.init_from is not None:
        with refusing():
            weights = run.state_dict(["model"])
            run.load_state_dict(start_from(config, weights, run.stream.tokenizer))
    start_evaluations(run)
    end_if_told(stop)
    refusing_on_all(
        partial(record_start, config, program=run.program, step=run.step, tokens=run.tokens, opened=opened)
    )
    if dist.get_rank() == 0:
        announce(run, opened.origin.path if opened.origin else None)
        run.checkpoints.warn_if_short(run.model.parameters())
    stop.has_started()
    return run


def train(config: Config, *, stop: StopRequest | None = None) -> int:
    """The whole run on this rank. Returns the exit code. Raises: as `start`, and what ends a run early."""
    run = start(config, stop=stop)
    config = run.config
    directory, metrics, peak = run.directory, None, math.inf
    if dist.get_rank() == 0:
        keep = None
        with suppress(OSError):  # a user without a home directory has no cache
            keep = cache_path(config.data.cache_dir) / "peak_flops.json"
        peak = device.peak_flops(run.device, getattr(torch, config.dtype), keep) * dist.get_world_size()
        if config.balance.trace is not None:
            trace = TraceWriter(directory / config.balance.trace, after_step=run.step)
            run.balancer.observers += (trace,)
        tracker = instantiate(config.logging.tracker)
        start_tracker = partial(tracker, directory, asdict(config)) if tracker else None
        metrics = MetricsLog(
            directory / "metrics.jsonl",
            steps=run.last_step,
            interval=config.logging.interval,
            after_step=run.step,
            start_tracker=start_tracker,
            histograms=config.logging.histograms,
        )
        run.balancer.watchers += (metrics.watch,)
    watchdog = Watchdog(
        directory, rank=dist.get_rank(), limit_s=config.heartbeat_s, first_limit_s=config.timeout_s
    )
    watchdog.start()
    try:
        with ExitStack() as closing:
            between = [closing.enter_context(other) for other in besides(run)]
            loop(run, metrics, watchdog, between=between, peak=peak)
    except FloatingPointError:  # of all ranks alike: the checkpoint that is being written is from before
        watchdog.heartbeat("saving", limit_s=config.timeout_s)
        with suppress(SaveError):
            run.checkpoints.finish()
        raise
    finally:
        watchdog.close()
        run.stream.close()
        if metrics is not None:
            metrics.close()
    return conclude(run)


def besides(run: Run) -> list[Garbage | Profile]:
    """What this rank does between steps."""
    p, rank = run.config.profile, dist.get_rank()
    if p.steps is None or p.rank != rank:
        return [Garbage()]
    first, last = p.steps
    return [Garbage(), Profile(run.directory, first=first, last=last, rank=rank, device=run.device)]


def announce(run: Run, loaded: Path | None) -> None:
    c = run.config
    now = run.program.settings_at(run.tokens)
    count = count_parameters(run.config.model)
    print(
        f"Triquetra · {c.name}: {count.total / 1e6:.1f}M parameters, {count.active / 1e6:.1f}M active, "
        f"on {dist.get_world_size()} x {run.device.type} in {c.dtype}, "
        f"{now.global_batch} x {now.seq_len} = {now.tokens} tokens a step"
    )
    if run.step >= run.last_step:
        longer = "steps= trains on" if c.steps is not None else "a longer stage= trains on"
        print(f"{run.directory} is complete at step {run.step}; {longer}, name= starts a new run")
    elif loaded is not None:
        is_own = run.directory in loaded.parents
        beginning = "continuing" if is_own else f"{'anew' if c.anew else 'branching'} from {loaded}"
        print(f"{beginning} at step {run.step} of {run.last_step}, {run.tokens} tokens seen")
    elif c.init_from is not None:
        print(f"starting from the weights of {c.init_from}")
    for problem in export_problems(c.model):
        log.warning("%s", problem.text)


def conclude(run: Run) -> int:
    """Prints where everything is and what became of the experts. Returns the exit code, the same on all
    ranks.
    """
    done = run.step >= run.last_step
    verdict = run.balancer.verdict()
    read = run.documents_read()
    num_open, tokens_read = run.over_documents(run.stream.open_documents).tolist()
    if dist.get_rank() == 0:
        print(f"{run.directory}: config.yaml, metrics.jsonl, checkpoints/ (step {run.step})")
        bad = ", ".join(f"{read[kind]} {kind}" for kind in BAD_KINDS if read[kind])
        skipped = f"skipped {bad} (bad_documents.*.txt)" if bad else "none skipped"
        print(f"data: {read['documents']} documents, {read['tokens']} tokens, {skipped}")
        if num_open and any(span.now.buffer for span in run.program.spans):
            print(left_open(read, num_open=num_open, tokens_read=tokens_read))
        if done:
            print(verdict)
            record_verdict(run.config, verdict, step=run.step)
        else:
            print(f"stopped at step {run.step} of {run.last_step}, saved; the same command continues")
    return run.stop.agreed or INTERRUPTED if not done else OK if verdict.ok else COLLAPSED


def left_open(read: dict[str, int], *, num_open: int, tokens_read: int) -> str:
    """Tells the user that the documents still open are the long ones, because draws are uniform."""
    of_open = (tokens_read + read["open"]) / num_open
    of_ended = (read["tokens"] - tokens_read) / max(1, read["documents"])
    share = read["open"] / (read["open"] + read["tokens"])
    text = (
        f"buffer: {num_open} documents are still open, {read['open']} of their tokens unread "
        f"({share:.0%} of all opened)"
    )
    short = "; long documents came short so far" if read["documents"] and of_open > 1.1 * of_ended else ""
    return f"{text}; their mean length is {of_open:.0f}, of those that ended {of_ended:.0f}{short}"


CODES = {
    ConfigError: REFUSED,
    BadDocument: NO_DATA,
    DataError: NO_DATA,
    SaveError: CANNOT_SAVE,
    FloatingPointError: UNSOUND,
    KeyboardInterrupt: INTERRUPTED,
}


def main(arguments: list[str] | None = None) -> int:
    overrides = sys.argv[1:] if arguments is None else arguments
    end_with_launcher()
    try:
        return terminal.run(partial(command, overrides), CODES)
    except Stopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:  # there may be no process group yet
            print(stopped, file=sys.stderr)
        return stopped.code
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def command(overrides: list[str]) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if (text := looked_up(overrides, __doc__)) is not None:
        print(text)
        return OK
    with StopRequest() as stop:
        return train(load(overrides), stop=stop)


if __name__ == "__main__":
    sys.exit(main())
