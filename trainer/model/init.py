"""How does every weight start, whatever the layout and the device?

A weight is drawn in blocks of rows; each block has its own generator, keyed by (seed, parameter, expert,
block). A rank draws the blocks that its shard touches and nothing else, so every layout starts from the
same model and no rank ever holds a whole expert tensor. (torchtitan's own initialisation draws equal
shards on a CPU mesh.)

Matrices: normal with std 0.5 / sqrt(D), truncated at 3 std (arXiv:2602.17004, section 2.4). Norm gains: 1,
those after a sublayer 1 / sqrt(layers) (eq. 33-35).
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from trainer.model.afmoe import Afmoe

BLOCK_ROWS = 64


@torch.no_grad()
def initialize(model: Afmoe, *, device: torch.device, seed: int) -> None:
    """Moves a meta model to `device` and fills it."""
    model.to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=device)
    std, num_layers = 0.5 / model.config.dim**0.5, len(model.layers)
    for name, parameter in model.named_parameters():
        name = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
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
            matrix.copy_(
                draw(
                    f"{seed}/{name}/{index}",
                    std,
                    rows=matrix.shape[0],
                    first=offset[-2],
                    columns=parameter.shape[-1],
                )
            )


def local_window(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of this rank's part; parts are cut along experts or rows, never along columns."""
    if not isinstance(parameter, DTensor):
        return tuple(parameter.shape), (0,) * parameter.ndim
    shape, offset = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    assert shape[-1] == parameter.shape[-1]
    return tuple(shape), tuple(offset)


def draw(key: str, std: float, *, rows: int, first: int, columns: int) -> Tensor:
    """Rows [first, first + rows) of the matrix named by `key`, on the CPU."""
    out = torch.empty(rows, columns)
    for block in range(first // BLOCK_ROWS, -(-(first + rows) // BLOCK_ROWS)):
        digest = hashlib.blake2b(f"{key}/{block}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        full = nn.init.trunc_normal_(
            torch.empty(BLOCK_ROWS, columns), std=std, a=-3 * std, b=3 * std, generator=generator
        )
        start = block * BLOCK_ROWS
        low, high = max(first, start), min(first + rows, start + BLOCK_ROWS)
        out[low - first : high - first] = full[low - start : high - start]
    return out
