"""What do cut rows cost: who has most to do, what is sent, and how do memory and time grow with a row?

python -m benchmarks.context balance    work of the slowest rank of a row over the mean, Large at 256K
python -m benchmarks.context bytes      what a rank receives, Large at 256K
python -m benchmarks.context memory     peak memory and time of a layer and a step against L, on this CPU
"""

import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

from trainer.config import ModelConfig, load
from trainer.model.afmoe import Afmoe, afmoe_config
from trainer.model.attention import QUERY_BLOCK
from trainer.model.context import Cut
from trainer.model.loss import linear_cross_entropy
from trainer.size import step_flops

LENGTH, ROWS = 262_144, 24
SIZES = (4, 8, 16, 32)
MIB = 2**20


def large() -> ModelConfig:
    return load(["experiment=trinity_large"]).model


# -- balance ----------------------------------------------------------------------------------------------


class Contiguous(Cut):
    """For comparison: each rank has one piece."""

    def held(self, length: int, *, rank: int | None = None) -> list[range]:
        rank, step = self.rank if rank is None else rank, length // self.size
        return [range(rank * step, (rank + 1) * step)]


class Turns(Cut):
    """For comparison: as many turns as are asked for, in `window`."""

    def turns(self, length: int) -> int:
        return self.window


def mean(low: int, high: int) -> float:
    """Of a log-uniform draw."""
    return (high - low) / math.log(high / low)


def packed_positions(draw: random.Random, length: int, *, long_share: float) -> torch.Tensor:
    """Of one row of a stream: that share of the tokens is in documents of half a row to a row, the rest in
    documents of 256 tokens to a 16th of a row; lengths are log-uniform. The first one is cut somewhere, as a
    stream's is.
    """
    filled, row = 0, list[torch.Tensor]()
    long, short = (length // 2, length), (min(256, length // 32), length // 16)
    of_long, of_short = (share / mean(*kind) for share, kind in ((long_share, long), (1 - long_share, short)))
    while filled < length:
        low, high = long if draw.random() < of_long / (of_long + of_short) else short
        size = int(low * (high / low) ** draw.random())
        start = draw.randrange(size) if not row else 0
        row.append(torch.arange(start, size)[: length - filled])
        filled += len(row[-1])
    return torch.cat(row)


def slowest_over_mean(model: ModelConfig, cuts: list[Cut], rows: list[torch.Tensor]) -> float:
    """In FLOP of a step; the mean over the rows, as each group of ranks waits for its slowest."""
    ratios = []
    for positions_L in rows:
        work = [step_flops(model, cut.own(positions_L[None])) for cut in cuts]
        ratios.append(max(work) / (sum(work) / len(work)))
    return sum(ratios) / len(ratios)


def rows_of(long_share: float, length: int = LENGTH, count: int = ROWS) -> list[torch.Tensor]:
    draw = random.Random(0)
    return [packed_positions(draw, length, long_share=long_share) for _ in range(count)]


def balance() -> None:
    model = large()
    kinds: dict[str, Callable[[int, int], Cut]] = {
        "contiguous": lambda size, rank: Contiguous(size=size, rank=rank),
        "1 turn": lambda size, rank: Turns(size=size, rank=rank, window=1),
        "ours": lambda size, rank: Cut(size=size, rank=rank, window=model.window),
        "4 turns": lambda size, rank: Turns(size=size, rank=rank, window=4),
        "8 turns": lambda size, rank: Turns(size=size, rank=rank, window=8),
    }
    rows = {"one document": [torch.arange(LENGTH)], "90 %": rows_of(0.9), "50 %": rows_of(0.5)}
    print("| rows | cp |", " | ".join(kinds), "| turns of ours |")
    print("|---|---|" + "---|" * len(kinds) + "---|")
    for name, of_kind in rows.items():
        for size in SIZES:
            ratios = [
                slowest_over_mean(model, [make(size, rank) for rank in range(size)], of_kind)
                for make in kinds.values()
            ]
            turns = Cut(size=size, window=model.window).turns(LENGTH)
            print(
                f"| {name} | {size} |",
                " | ".join(f"{ratio:.2f}" for ratio in ratios),
                f"| {turns} |",
                flush=True,
            )


# -- bytes ------------------------------------------------------------------------------------------------


def mean_received(cuts: list[Cut], window: int | None, *, token: int) -> float:
    """[bytes] of a row in one pass of one layer."""
    return token * sum(sum(cut.exchange(LENGTH, window).receive_counts) for cut in cuts) / len(cuts)


def sent() -> None:
    m = large()
    token = 2 * m.num_kv_heads * m.head_dim * 2
    num_global = m.num_layers // m.global_every
    columns = ("cp", "turns", "local layer", "global layer", "all, 3 passes", "all, gathered", "Ulysses")
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for size in SIZES:
        cuts = [Cut(size=size, rank=rank, window=m.window) for rank in range(size)]
        local, whole = (mean_received(cuts, window, token=token) for window in (m.window, None))
        gathered = token * LENGTH * (size - 1) / size
        every = 3 * ((m.num_layers - num_global) * local + num_global * whole)
        # queries and outputs, keys and values: each rank keeps 1 / C of its own
        ulysses = 2 * (2 * m.num_heads + 2 * m.num_kv_heads) * m.head_dim * LENGTH / size * (size - 1) / size
        if size > m.num_kv_heads:  # heads of keys and values are copied
            ulysses = 2 * (2 * m.num_heads + 2 * size) * m.head_dim * LENGTH / size * (size - 1) / size
        print(
            f"| {size} | {cuts[0].turns(LENGTH)} | {local / MIB:,.0f} MiB | {whole / MIB:,.0f} MiB "
            f"| {every / MIB / 1024:,.0f} GiB | {3 * m.num_layers * gathered / MIB / 1024:,.0f} GiB "
            f"| {ulysses / MIB:,.0f} MiB |"
        )


# -- memory and time --------------------------------------------------------------------------------------

HEADS, KV_HEADS, HEAD_DIM, WINDOW = 8, 2, 32, 256
LENGTHS = (1024, 2048, 4096, 8192, 16_384)


def measured(work: Callable[[int], None], length: int) -> tuple[float, float]:
    """[MiB] at most beside what was there before, and [s]; in a process of its own, the second time."""

    def child(pipe) -> None:
        torch.set_num_threads(1)
        work(LENGTHS[0] // 2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, start_s = resident(), time.perf_counter()
        work(length)
        pipe.send(((resident(peak=True) - before) / MIB, time.perf_counter() - start_s))

    here, there = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=child, args=(there,))
    process.start()
    there.close()
    result = here.recv()
    process.join()
    return result


def resident(*, peak: bool = False) -> int:
    """[bytes] of this process."""
    key = "VmHWM" if peak else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def attention(length: int, *, window: int | None) -> None:
    """Forward and backward of a layer's attention, its masks included."""
    model = layers()
    inputs = model.attention_inputs(torch.arange(length)[None])
    layer = model.layers["0" if window else "1"].attention
    mask = inputs.local_mask if window else inputs.global_mask
    q, k, v = heads_of(length)
    layer.inner_attention(q, k, v, attention_masks=mask, enable_gqa=True).sum().backward()


@cache
def layers() -> Afmoe:
    """A local and a global one, without weights."""
    shape = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "window": WINDOW}
    model = replace(load(["experiment=demo"]).model, num_layers=2, global_every=2, **shape)
    with torch.device("meta"):
        return afmoe_config(model, flex=False).build()


def heads_of(length: int) -> list[torch.Tensor]:
    return [torch.randn(1, length, n, HEAD_DIM, requires_grad=True) for n in (HEADS, KV_HEADS, KV_HEADS)]


def by_autograd(length: int, *, window: int | None) -> None:
    """As it was: one mask of all pairs, a node of autograd for each block of queries."""
    index = torch.arange(length)
    distance = index[:, None] - index
    mask = (distance >= 0) & (distance < (window or length))
    q, k, v = (each.transpose(1, 2) for each in heads_of(length))
    parts = []
    size = QUERY_BLOCK[torch.float32]
    for start in range(0, length, size):
        keys = slice(max(0, start - window + 1) if window else 0, start + size)
        part = F.scaled_dot_product_attention(
            q[:, :, start : start + size],
            k[:, :, keys],
            v[:, :, keys],
            attn_mask=mask[start : start + size, keys],
            enable_gqa=True,
        )
        parts.append(part.transpose(1, 2))
    torch.cat(parts, dim=1).sum().backward()


def head(length: int, *, whole: bool) -> None:
    """The loss of a row and its gradients, with a vocabulary of 16,384."""
    x, weight = torch.randn(length, 128, requires_grad=True), torch.randn(16_384, 128, requires_grad=True)
    labels = torch.randint(16_384, (length,))
    if whole:
        F.cross_entropy(x @ weight.T, labels, reduction="sum").backward()
    else:
        linear_cross_entropy(x, weight, labels).backward()


def step(length: int) -> None:
    """Forward and backward of model=tiny on one row, all activations kept."""
    model = afmoe_config(load(["experiment=demo", "model=tiny"]).model, flex=False).build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=torch.device("cpu"))
    tokens = torch.randint(model.config.vocab_size, (1, length))
    model(tokens, None, tokens).backward()


WORK: dict[str, Callable[[int], None]] = {
    "local layer": partial(attention, window=WINDOW),
    "by autograd": partial(by_autograd, window=WINDOW),
    "global layer": partial(attention, window=None),
    "by autograd, global": partial(by_autograd, window=None),
    "loss head": partial(head, whole=False),
    "loss head, all logits": partial(head, whole=True),
    "step": step,
}


def memory() -> None:
    print("| L |", " | ".join(f"{name} [MiB, s]" for name in WORK), "|")
    print("|---|" + "---|" * len(WORK))
    for length in LENGTHS:
        results = (measured(work, length) for work in WORK.values())
        print(f"| {length:,} |", " | ".join(f"{mib:,.0f}, {s:.2f}" for mib, s in results), "|", flush=True)


COMMANDS = {"balance": balance, "bytes": sent, "memory": memory}


if __name__ == "__main__":
    COMMANDS[sys.argv[1]]()
