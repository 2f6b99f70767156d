"""What do balancing and logging cost at the size of Trinity Large, 60 layers of 256 experts?

    python -m benchmarks.balancer

`Balancer.step` (counts, SMEBU, biases, metrics, guard, history) for 60 x 256 and a line of metrics.jsonl,
next to a whole training step of model=small (9 layers) in the same run: the share is an upper limit, for a
model with 60 layers of 256 experts takes longer steps than that.
"""

import statistics
import tempfile
import time
from pathlib import Path

from torch import nn

from benchmarks.train_step import SETTINGS, packed_batch
from trainer import train
from trainer.balance import Balancer, Guard, SmebuRule, register_routing_buffers
from trainer.config import load
from trainer.metrics import MetricsLog

LAYERS, EXPERTS, TOP_K, ROUNDS = 60, 256, 4, 7


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k = TOP_K
        register_routing_buffers(self, EXPERTS)


def main() -> None:
    layers = [Layer() for _ in range(LAYERS)]
    rule, guard = SmebuRule((LAYERS, EXPERTS), lr=5e-4, beta=0.5, kappa=2.0), Guard((LAYERS, EXPERTS))
    balancer = Balancer(layers, rule, steps=10**6, guard=guard)
    run = train.build(load(SETTINGS))
    batches = [packed_batch(run.config.model.vocab_size, rows=4, seq_len=512)]
    with tempfile.TemporaryDirectory() as directory:
        log = MetricsLog(Path(directory) / "metrics.jsonl", steps=10**6, interval=10**6)
        balancer.watchers += (log.watch,)
        train.train_step(run, batches)
        balancing_s, balancing_cpu_s, step_s = [], [], []
        for step in range(2, 2 + ROUNDS):
            for layer in layers:
                layer.routing_sums_S.random_(0, 100_000)
            start_s, start_cpu_s = time.perf_counter(), time.thread_time()
            metrics = balancer.step(step)
            log.write({"step": step, "loss": 1.0, "tokens_per_s": 1.0, **metrics})
            balancing_s.append(time.perf_counter() - start_s)
            balancing_cpu_s.append(time.thread_time() - start_cpu_s)
            start_s = time.perf_counter()
            train.train_step(run, batches)
            step_s.append(time.perf_counter() - start_s)
        log.close()
    shares = [b / s for b, s in zip(balancing_s, step_s, strict=True)]
    print(
        f"balancer and metrics, {LAYERS} layers x {EXPERTS} experts: "
        f"{statistics.median(balancing_s) * 1e3:.1f} ms, "
        f"{statistics.median(balancing_cpu_s) * 1e3:.1f} ms of CPU"
    )
    print(f"training step, model=small, 2,048 tokens: {statistics.median(step_s) * 1e3:.0f} ms")
    print(f"share {statistics.median(shares):.2%} (rounds {min(shares):.2%} to {max(shares):.2%})")


if __name__ == "__main__":
    main()
