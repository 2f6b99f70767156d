"""Small runs: the settings of most, what they left behind, and a gradient that goes wrong."""

import json
import math
import sys
from pathlib import Path

import torch

from trainer import train
from trainer.checkpoint import read_whole

BASE = [
    "model=debug",  # of which fewer layers have every part, too: a dense one, a local one, a global one
    "model.num_layers=3",
    "model.global_every=3",
    "data=synthetic",
    "data.source.mean_length=40",
    "steps=20",
    "seq_len=32",
    "global_batch=4",
    "micro_batch=1",
    "checkpoint.interval=1000",
]


def tensors(directory: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, whole."""
    return read_whole(directory / "checkpoints" / f"step-{step:08d}")


def metrics(directory: Path) -> list[dict]:
    timed = ("tokens_per_s", "mfu", "memory_gib", "data/wait_s")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


NAN = math.nan


class Scaled(torch.autograd.Function):
    """The same loss; its gradient times a factor."""

    @staticmethod
    def forward(ctx, loss, factor):
        ctx.factor = factor
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def run_main(overrides):
    sys.argv = ["train", *overrides]
    return train.main()
