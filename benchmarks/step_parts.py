"""What does each of our own paths of a CPU give in a whole training step?

    OMP_NUM_THREADS=1 python -m benchmarks.step_parts [rounds=9] [any setting of the trainer]

One run; in each round a step as it is, and one with a path exchanged for what torch has. CPU seconds of the
process, so other work on the machine hardly matters. Ratios are of one round, with their median and spread.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from benchmarks.train_step import SETTINGS, packed_batch
from trainer import train
from trainer.config import load
from trainer.model import attention, moe, norm


def torch_attention(q_BLNH, k_BLNH, v_BLNH, masks):
    """Autograd keeps what it needs of each block."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
    parts = [
        F.scaled_dot_product_attention(
            *masks.inputs(block, q, k, v), attn_mask=masks.mask(number, q.dtype), enable_gqa=True
        )
        for number, block in enumerate(masks.blocks)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def torch_experts(x_RD, w1_EFD, w2_EDF, w3_EFD, sizes_E):
    ends_E = sizes_E.cumsum(0, dtype=torch.int32)
    gate, up = (torch._grouped_mm(x_RD, w.mT, offs=ends_E) for w in (w1_EFD, w3_EFD))
    return torch._grouped_mm(F.silu(gate) * up, w2_EDF.mT, offs=ends_E)


@contextmanager
def without(part: str) -> Iterator[None]:
    """A step in which torch has the part's place."""
    before = (
        norm._RMSNorm.apply,
        attention._Masked.apply,
        attention._MaskedMatmuls.apply,
        moe._SwigluLoop.apply,
    )
    if part == "norm":
        norm._RMSNorm.apply = lambda x_D, weight_D, eps: F.rms_norm(x_D, weight_D.shape, weight_D, eps)
    if part == "attention":
        attention._Masked.apply = attention._MaskedMatmuls.apply = torch_attention
    if part == "experts":
        moe._SwigluLoop.apply = torch_experts
    yield
    (
        norm._RMSNorm.apply,
        attention._Masked.apply,
        attention._MaskedMatmuls.apply,
        moe._SwigluLoop.apply,
    ) = before


def main() -> None:
    own = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("rounds="))
    config = load([*SETTINGS, *(word for word in sys.argv[1:] if not word.startswith("rounds="))])
    run = train.build(config)
    batches = [packed_batch(config.model.vocab_size, rows=config.global_batch, seq_len=config.seq_len)]
    parts = ["nothing", "norm", "attention", "experts"]
    rounds: list[dict[str, float]] = []
    for _ in range(int(own.get("rounds", 9)) + 2):
        rounds.append({})
        for part in parts:
            with without(part):
                start_s = time.process_time()
                train.train_step(run, batches)
                rounds[-1][part] = time.process_time() - start_s
    as_it_is = statistics.median(of[parts[0]] for of in rounds[2:])
    threads, version = torch.get_num_threads(), torch.__version__
    print(f"{config.dtype}: {as_it_is:.2f} CPU s a step, {threads} threads, torch {version}")
    for part in parts[1:]:
        ratios = sorted(of[part] / of["nothing"] for of in rounds[2:])
        spread = f"{statistics.median(ratios):.3f}x ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"torch's {part:10s} {spread} the CPU time")


if __name__ == "__main__":
    main()
