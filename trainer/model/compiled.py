"""What is compiled beside whole blocks, and with which options? And how many graphs may there be?

Nothing is chosen by timing it: each rank would choose for itself, and a restart might choose another kernel,
which gives other bits. Every shape has a graph of its own, as one for all shapes is slower.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

OPTIONS = {
    "max_autotune": False,
    "coordinate_descent_tuning": False,
    "deterministic": True,  # no choice by a benchmark where it would change the bits
    "triton.cudagraphs": False,
    "wrap_inductor_compiled_regions": True,  # selective checkpointing sees, and saves, what a region returns
}
GRAPHS = 64  # of one function; torch's 8 end a run at the third sequence length of its program
KINDS = 4  # blocks are dense or MoE, local or global
MODES = 2  # with gradients and without


def compiled(function: Callable) -> Callable:
    """The function, compiled for each shape on a GPU; as it is elsewhere, and inside of a compiled block."""
    fused = torch.compile(function, dynamic=False, fullgraph=True, options=OPTIONS)

    @wraps(function)
    def call(*args, **kwargs):
        is_fused = args[0].is_cuda and not torch.compiler.is_compiling()
        return (fused if is_fused else function)(*args, **kwargs)

    return call


flex = torch.compile(flex_attention, dynamic=False, options=OPTIONS)
block_mask = torch.compile(create_block_mask, dynamic=False, options=OPTIONS)


def allow_graphs(*, num_shapes: int) -> None:
    """Lets each block be compiled for num_shapes shapes of microbatches, and for each of them alone."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    limit = max(GRAPHS, num_shapes * KINDS * MODES)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(256, 4 * limit)
