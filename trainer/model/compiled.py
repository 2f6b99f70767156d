"""What is compiled beside whole blocks, and with which options? And how many graphs may there be?

Nothing is chosen by timing it: each rank would choose for itself, and a restart might choose another kernel,
which gives other bits. Every shape has a graph of its own, as one for all shapes is slower.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def when_called(function: Callable, **options) -> Callable:
    """The function, compiled when it is first called; as it is inside of a compiled block.

    torch.compile imports Inductor, which would take 2 s of every start.
    """
    made = list[Callable]()

    @wraps(function)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not made:
            made.append(torch.compile(function, **options))
        return made[0](*args, **kwargs)

    return call


@contextmanager
def compiling_when_called() -> Iterator[None]:
    """While a library is imported that compiles functions as it is imported."""
    now = torch.compile

    def later(function: Callable | None = None, **options) -> Callable:
        return now(**options) if function is None else when_called(function, **options)

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = now


def compiled(function: Callable) -> Callable:
    """The function, compiled for each shape on a GPU; as it is elsewhere, and inside of a compiled block."""
    fused = when_called(function, dynamic=False, fullgraph=True, options=OPTIONS)

    @wraps(function)
    def call(*args, **kwargs):
        return (fused if args[0].is_cuda else function)(*args, **kwargs)

    return call


flex = when_called(flex_attention, dynamic=False, options=OPTIONS)
block_mask = when_called(create_block_mask, dynamic=False, options=OPTIONS)


def allow_graphs(*, num_shapes: int) -> None:
    """Lets each block be compiled for num_shapes shapes of microbatches, and for each of them alone."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    limit = max(GRAPHS, num_shapes * KINDS * MODES)
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.config.accumulated_recompile_limit = max(256, 4 * limit)
