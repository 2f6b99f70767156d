"""A run that is the same on every layout: its settings, its global batches, its tensors whole."""

import torch
from torch.distributed.tensor import DTensor

from trainer.data import Batch

SEQ_LEN, GLOBAL_BATCH, STEPS = 64, 8, 3

BASE = [
    "name=parallel",
    "model=debug",
    "model.num_layers=3",
    "model.global_every=3",
    "data=synthetic",
    "data.source.num_topics=8",
    f"steps={STEPS}",
    f"seq_len={SEQ_LEN}",
    f"global_batch={GLOBAL_BATCH}",
    "stage.warmup.share=0",
    "balance.sequence_loss_weight=0.01",
    "z_loss_weight=1e-3",
]


def batches(step: int) -> Batch:
    """A global batch of packed documents with labels missing unevenly over the rows."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 1024, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    cut = torch.randint(5, 60, (GLOBAL_BATCH, 1), generator=generator)
    index = torch.arange(SEQ_LEN).expand(GLOBAL_BATCH, -1)
    labels = tokens[:, 1:].clone()
    labels[index == cut - 1] = -100
    labels[0, :40] = -100
    return Batch(tokens[:, :-1], labels, torch.where(index < cut, index, index - cut))


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
