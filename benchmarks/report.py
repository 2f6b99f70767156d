"""What does the history of all experts cost a step, and how long does the report of a long run take?

    python -m benchmarks.report

First the size of experts.jsonl at 60 layers x 256 experts. Second a report of 100,000 steps, of the records
that benchmarks/records.py makes. Third `Balancer.step` with and without its watcher, in turns in one run,
next to a training step of model=small (9 layers): the share is an upper limit, as in benchmarks/balancer.py.
Seconds are of the process's cores, which a busy machine does not stretch.
"""

import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.balancer import EXPERTS, LAYERS, TOP_K, Layer
from benchmarks.records import write_history, write_run
from benchmarks.train_step import SETTINGS, packed_batch
from trainer import train
from trainer.balance import Balancer, SmebuRule
from trainer.config import load
from trainer.lab.report.__main__ import main as report
from trainer.metrics import MetricsLog

ROUNDS, STEPS = 25, 100_000


def cost_of_the_history() -> None:
    layers = [Layer() for _ in range(LAYERS)]
    balancer = Balancer(layers, SmebuRule((LAYERS, EXPERTS), lr=5e-4, beta=0.5, kappa=2.0), steps=10**6)
    run = train.build(load(SETTINGS))
    batches = [packed_batch(run.config.model.vocab_size, rows=4, seq_len=512)]
    seconds: dict[str, list[float]] = {"without": [], "with": [], "step": []}
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory) / "metrics.jsonl", steps=10**6, interval=10**6)
        train.train_step(run, batches)
        for step in range(1, 2 * ROUNDS + 1):
            which = "with" if step % 2 else "without"
            balancer.watchers = (log.watch,) if step % 2 else ()
            for layer in layers:
                layer.routing_sums_S.random_(0, 100_000)
            start_s = time.process_time()
            balancer.step(step)
            seconds[which].append(time.process_time() - start_s)
            if step % 10 == 0:
                start_s = time.process_time()
                train.train_step(run, batches)
                seconds["step"].append(time.process_time() - start_s)
        log.close()
    without, watched, step_s = (statistics.median(seconds[key]) for key in ("without", "with", "step"))
    extra_s = watched - without
    print(f"Balancer.step, {LAYERS} x {EXPERTS}, top {TOP_K}: {without * 1e3:.2f} ms without the history")
    print(f"with it: {watched * 1e3:.2f} ms; slowest (a bin is written) {max(seconds['with']) * 1e3:.2f} ms")
    print(f"the history takes {extra_s / step_s:.3%} of a training step of {step_s * 1e3:.0f} ms")


def size_of_the_history(directory: Path) -> None:
    rng = np.random.default_rng(0)
    for steps in (100, 1000, 10_000, 100_000):
        path = directory / f"{steps}.jsonl"
        start_s = time.process_time()
        write_history(path, rng, steps=steps, layers=LAYERS, experts=EXPERTS)
        each_s = (time.process_time() - start_s) / steps
        lines = path.read_text().splitlines()
        last = json.loads(lines[-2])
        bins = f"{len(lines) - 1} bins, the last full one of {last['step'] - last['from'] + 1} steps"
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        print(f"experts.jsonl after {steps:,} steps: {size}, {bins}, {each_s * 1e6:.0f} us a step")


def time_of_a_report(directory: Path) -> None:
    run = write_run(directory / "long", steps=STEPS, layers=LAYERS, experts=EXPERTS)
    size = (run / "metrics.jsonl").stat().st_size
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    report([str(run)])
    wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    page = run / "report.html"
    print(
        f"report of {STEPS:,} steps ({size / 1e6:.0f} MB of metrics): {wall_s:.1f} s, {cpu_s:.1f} s on a core"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"the page: {page.stat().st_size / 1e6:.2f} MB; memory of this process: {peak:.2f} GiB at most")


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        size_of_the_history(Path(directory))
        time_of_a_report(Path(directory))
    cost_of_the_history()


if __name__ == "__main__":
    main()
