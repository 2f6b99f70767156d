"""What does the history of all experts cost a step, and how long does the report of a long run take?

    python -m benchmarks.report

The first part: `Balancer.step` of 60 layers x 256 experts with and without its watcher, in turns in one run,
next to a training step of model=small (9 layers): the share is an upper limit, as in benchmarks/balancer.py.
Seconds are of the process's cores, which a busy machine does not stretch.
The second: the size of experts.jsonl. The third: a report of 100,000 steps, written by `write_run`.
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
from benchmarks.train_step import SETTINGS, packed_batch
from trainer import train
from trainer.balance import Balancer, SmebuRule
from trainer.config import load
from trainer.history import ExpertHistory
from trainer.lab.report.__main__ import main as report
from trainer.metrics import EXPERTS as EXPERTS_FILE
from trainer.metrics import MetricsLog

ROUNDS, STEPS = 25, 100_000
SPANS = [("warmup", 0, 0.02), ("stable", 0.02, 0.8), ("decay", 0.8, 1.0)]


def write_run(
    directory: Path, *, steps: int, layers: int = LAYERS, experts: int = EXPERTS, seed: int = 0, **config
) -> Path:
    """A run's directory as a training run of so many steps leaves it, from random numbers."""
    rng, tokens = np.random.default_rng(seed), 4096
    directory.mkdir(parents=True)
    end = steps * tokens
    spans = [
        {"span": name, "start": int(a * end), "end": int(b * end), "global_batch": 16, "seq_len": 256}
        for name, a, b in SPANS
    ]
    settings = {"name": directory.name, "seed": seed, "steps": steps, "balance": {"name": "smebu"}, **config}
    (directory / "config.yaml").write_text(json.dumps(settings))
    start = {"step": 0, "tokens": 0, "loaded": None, "changed": {}, "code": "0.1.0", "program": spans}
    (directory / "starts.jsonl").write_text(json.dumps(start) + "\n")
    evaluations = [
        {"step": step, "tokens": step * tokens, "evaluation": "held_out", "loss": loss_at(step), "targets": 9}
        for step in range(0, steps + 1, max(1, steps // 100))
    ]
    (directory / "evaluations.jsonl").write_text("".join(f"{json.dumps(e)}\n" for e in evaluations))
    noise_S = rng.normal(size=steps)
    with (directory / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(line(step, tokens, float(noise_S[step - 1]), layers)) + "\n")
    write_history(directory / EXPERTS_FILE, rng, steps=steps, layers=layers, experts=experts)
    return directory


def loss_at(step: int) -> float:
    return 2.0 + 8.0 / (1 + step) ** 0.3


def line(step: int, tokens: int, noise: float, layers: int) -> dict[str, float]:
    """As many numbers as a run of model=large logs, as long as real ones."""
    return {
        "step": step,
        "tokens": step * tokens,
        "loss": loss_at(step) + 0.05 * noise,
        "grad_norm": float(np.exp(0.3 * noise)),
        "lr": 8e-4,
        "lr_adamw": 2e-4,
        "batch_het": 0.1 + 0.01 * noise,
        "loss_kurtosis": 3.0 + 0.1 * noise,
        "grad_norm_kurtosis": 4.0 + 0.1 * noise,
        "skipped_steps": 0,
        "data/documents": step,
        "data/open": 1000,
        "data/padding": 0,
        "data/truncated": 0,
        "data/skipped": 0,
        "data/step_tokens": float(tokens),
        "data/step_flop": 1.5e12 + noise,
        "data/wait_s": 0.001 * abs(noise),
        "tokens_per_s": 6000.0 + 100 * noise,
        "mfu": 0.4 + 0.01 * noise,
        "memory_gib": 60.123,
        "balance/max_violation": 0.2 + 0.03 * noise,
        "balance/max_violation_worst_layer": 0.4 + 0.03 * noise,
        "balance/floor": 0.05,
        "balance/min_load": 0.7 + 0.01 * noise,
        "balance/dead_experts": 0.0,
        "balance/entropy": 0.99 + 0.001 * noise,
        "balance/bias_rms": 0.01,
        "balance/gain": 20.0 + noise,
        "balance/logit_rms": 1.0 + 0.1 * noise,
        **{f"balance/stability/{m}": 0.01 + 0.001 * noise for m in range(layers)},
        "guard/alarm": 0.0,
    }


def write_history(
    path: Path, rng: np.random.Generator, *, steps: int, layers: int, experts: int, draws: int = 64
) -> None:
    """Loads that lie around shares of the experts' own: the same few draws again and again."""
    own_ME = rng.lognormal(sigma=0.1, size=(layers, experts))
    load_DME = rng.lognormal(sigma=0.1, size=(draws, layers, experts)) * own_ME
    bias_ME, gain_M = rng.normal(scale=0.01, size=(layers, experts)), rng.uniform(10, 30, layers)
    history = ExpertHistory(path)
    for step in range(1, steps + 1):
        history.add(step, load_ME=load_DME[step % draws], bias_ME=bias_ME, gain_M=gain_M)
    history.close()


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
    run = write_run(directory / "long", steps=STEPS)
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
