"""The plan of a run: what small traces add up to is what the whole model does, on ranks that are not there and
on ranks that are.
"""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from trainer.config import ConfigError, ParallelConfig, load
from trainer.lab.plan import hardware as devices
from trainer.lab.plan.calibration import read
from trainer.lab.plan.hardware import hardware
from trainer.lab.plan.layout import Layout, Traffic, memory, sent_on, traffic
from trainer.lab.plan.trace import OptimizerStep, Traces, axis_of, optimizer_step, traced
from trainer.lab.plan.watch import KINDS, Sent, Watch
from trainer.model.afmoe import afmoe_config, flops_per_token
from trainer.model.parallelize import build_parallel
from trainer.ranks import device

LAYOUTS = [(1, 4, 1), (2, 2, 1), (1, 4, 2), (2, 4, 2), (1, 8, 4), (2, 2, 2), (1, 16, 2)]  # replicate, shard, ep
POLICIES = ["none", "selective", "full"]
SETTINGS = ["name=x", "steps=1", "seq_len=64", "global_batch=48", "micro_batch=1", "dtype=bfloat16"]
FREE = OptimizerStep((1, 1, 1), 0.0, 0.0, 0.0, 0.0, 0, Counter(), Counter())


def config_of(*overrides: str):
    return load(["model=debug", *SETTINGS, *overrides])


def in_a_process(worker, tmp_path, *args):
    """The fake device takes torch's one free name for the rest of a process."""
    torch.multiprocessing.start_processes(_saved, args=(worker, tmp_path, args), nprocs=1, start_method="fork")
    return torch.load(tmp_path / "result", weights_only=False)


def _saved(rank, worker, directory, args):
    torch.save(worker(*args), directory / "result")


def sums(sent: Counter) -> dict:
    """Bytes by phase, operator and what is carried."""
    total = Counter()
    for key, size in sent.items():
        total[key.phase, key.operator, key.part] += size
    return {key: size for key, size in total.items() if size}


# -- against a trace of the whole model ---------------------------------------------------------------------


def compare(policy):
    config = config_of()
    traces, rows = Traces(config), []
    for degrees in LAYOUTS:
        layout = Layout(degrees[0] * degrees[1], degrees[0], degrees[2], 1, policy)
        fit = traces.whole(layout.variant(config.model.num_experts))
        whole = traced(config, config.model, degrees, policy, tokens=traces.tokens)
        needs = memory(layout, fit, FREE, hardware("h200"), tokens=traces.tokens, accumulation=1)
        rows.append(
            {
                "degrees": degrees,
                "flop": (dict(fit.flop), dict(whole.flop)),
                "sent": (sums(sent_on(layout, fit, tokens=traces.tokens)), sums(whole.sent)),
                "peak": (sum(needs.kinds.values()), max(m.sum((1, 2)).max() for m in whole.moments.values())),
                "after": whole.after,
            }
        )
    return rows


@pytest.mark.parametrize("policy", POLICIES)
def test_small_traces_add_up_to_the_whole(policy, tmp_path):
    for row in in_a_process(compare, tmp_path, policy):
        flop, whole_flop = row["flop"]
        assert flop == pytest.approx(whole_flop, rel=1e-12), row["degrees"]
        sent, whole_sent = row["sent"]
        assert sent == pytest.approx(whole_sent, rel=1e-12), row["degrees"]
        assert row["peak"][0] == pytest.approx(row["peak"][1], rel=0.01), row["degrees"]
