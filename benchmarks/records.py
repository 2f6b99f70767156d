"""Records of a run that never was, as long as real ones: for benchmarks and tests of what reads them."""

import json
from pathlib import Path

import numpy as np

from trainer.history import ExpertHistory

SPANS = [("warmup", 0, 0.02), ("stable", 0.02, 0.8), ("decay", 0.8, 1.0)]


def write_run(directory: Path, *, steps: int, layers: int, experts: int, seed: int = 0, **config) -> Path:
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
    write_history(directory / "experts.jsonl", rng, steps=steps, layers=layers, experts=experts)
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
