"""How does every weight start, whatever the layout and the device?

A weight is drawn in blocks of rows; each block has its own generator, keyed by (seed, parameter, expert,
block). A rank draws the blocks that its shard touches and nothing else, so every layout starts from the
same model and no rank ever holds a whole expert tensor. (torchtitan's own initialisation draws equal
shards on a CPU mesh.)

Matrices: normal with std 0.5 / sqrt(D), truncated at 3 std (arXiv:2602.17004, section 2.4). Norm gains: 1,
those after a sublayer 1 / sqrt(layers) (eq. 33-35).
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.model.afmoe import Afmoe

BLOCK_ROWS = 64


@torch.no_grad()
def initialize(
    model: Afmoe, *, device: torch.device, seed: int, report: Callable[[str], None] | None = None
) -> None:
    """Moves a meta model to `device` and fills it. report: is told how far that is, if it takes long."""
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=device)
    std, num_layers = 0.5 / model.config.dim**0.5, len(model.layers)
    progress = Progress(sum(local_of(p).numel() for p in model.parameters() if p.ndim > 1), report=report)
    with ThreadPoolExecutor(num_threads()) as pool:
        for name, parameter in model.named_parameters():
            name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
            local = local_of(parameter)
            if parameter.ndim == 1:
                local.fill_(num_layers**-0.5 if ".post_" in name else 1.0)
                continue
            shape, offset = local_window(parameter)
            matrices = (
                zip(local, range(offset[0], offset[0] + shape[0]), strict=True)
                if parameter.ndim == 3
                else [(local, 0)]
            )
            for matrix, index in matrices:
                size = {"rows": matrix.shape[0], "first": offset[-2], "columns": parameter.shape[-1]}
                matrix.copy_(draw(f"{seed}/{name}/{index}", std, **size, over=pool.map))
                progress.add(matrix.numel())


class Progress:
    """Says once in PAUSE_S how far it is, if it takes so long. Only on ranks that are handed a report."""

    PAUSE_S = 5.0

    def __init__(
        self,
        total: int,
        *,
        report: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.done, self.report, self.clock = total, 0, report, clock
        self.said_s = clock()

    def add(self, num: int) -> None:
        self.done += num
        if self.report is not None and self.clock() - self.said_s >= self.PAUSE_S:
            self.said_s = self.clock()
            self.report(
                f"initial weights: {self.done / self.total:.0%} of this rank's {self.total / 1e9:.1f} B"
            )


def num_threads() -> int:
    """The cores that this rank has for itself: torch's operators let go of the interpreter lock."""
    return max(1, min(32, num_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def local_of(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def local_window(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part; parts are cut along experts or rows, never along columns."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.ndim
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert shape[-1] == parameter.shape[-1]
    return tuple(shape), tuple(offset)


def draw(
    key: str, std: float, *, rows: int, first: int, columns: int, over: Callable[..., Iterable] = map
) -> Tensor:
    """Rows [first, first + rows) of the matrix named by `key`, on the CPU. over: `map`, or that of a pool."""
    out = torch.empty(rows, columns)

    def fill(block: int) -> None:
        start = block * BLOCK_ROWS
        low, high = max(first, start), min(first + rows, start + BLOCK_ROWS)
        digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        rows_here = out[low - first : high - first]
        if high - low == BLOCK_ROWS:
            draw_truncated(rows_here, std, generator)
        else:  # a part of what other ranks draw, too
            whole = draw_truncated(torch.empty(BLOCK_ROWS, columns), std, generator)
            rows_here.copy_(whole[low - start : high - start])

    deque(over(fill, range(first // BLOCK_ROWS, -(-(first + rows) // BLOCK_ROWS))), maxlen=0)
    return out


def draw_truncated(out: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Normal values in place; those beyond 3 std are drawn again, in tensors of the same size. These are the
    bits of nn.init.trunc_normal_ (torch 2.13), whose masks over whole tensors take as long as the draws.
    """
    flat, limit = out.view(-1).normal_(0, std, generator=generator), float(np.float32(3 * std))
    far = np.flatnonzero((flat.abs() > limit).numpy())
    while len(far):
        values = torch.empty_like(flat).normal_(0, std, generator=generator).numpy()[far]
        flat.numpy()[far] = values
        far = far[np.abs(values) > limit]
    return out
