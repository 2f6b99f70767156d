"""How does a machine without a GPU run the GPU's branches of a training step, as one rank of thousands?

A device that exists in Python only: its tensors have shapes and no memory, its streams and events do nothing,
its process group carries nothing. (Fake CUDA tensors will not do: without a GPU they have no backward pass.)
Two things cannot be run on shapes: a compiled attention kernel, and sizes that depend on what the router
chose. `stand_ins` puts one operator in place of the first, which costs and saves what the kernel does, and
the sizes of balanced routing in place of the second.

The device takes the name of torch's one free slot for devices, for the rest of the process.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # collectives on fake tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # the backend "fake"
from torch.utils import backend_registration

from trainer.model import afmoe, dispatch, moe, norm, recompute
from trainer.ranks import device

NAME = "fakegpu"
FUSED = (
    "spread_gradient",
    "gather_sum_in_order",
)  # of model/dispatch: one kernel each, where they are compiled


class Stream:
    """Work is done when it is asked for."""

    device_index = stream_id = 0
    device_type = 20  # of torch's free slot

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return Event()

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args) -> None:
        pass

    def wait(self, *args) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class FakeGpu(backend_registration._DummyBackendModule):
    """What torch asks the module of a device for."""

    Stream, Event = Stream, Event

    def set_device(self, index: int) -> None:
        pass

    def current_stream(self, index: int | None = None) -> Stream:
        return Stream()

    default_stream = current_stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        yield

    def synchronize(self, index: int | None = None) -> None:
        pass

    def get_rng_state(self, index: int | None = None) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, index: int | None = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]


@cache
def fake_mode() -> FakeTensorMode:
    """Registers the device; all its tensors belong to this mode. Once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=FakeGpu())
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    library = torch.library.Library("aten", "IMPL")  # FSDP makes an empty tensor outside of any mode

    def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        with mode:
            return torch.empty(size, dtype=dtype, device=device)

    library.impl("empty.memory_format", empty, "PrivateUse1")
    mode.keeps_alive = library
    return mode


@contextmanager
def ranks(num_ranks: int) -> Iterator[FakeTensorMode]:
    """This process is rank 0 of `num_ranks` that do not exist."""
    mode = fake_mode()
    dist.init_process_group(f"{NAME}:fake,cpu:fake", rank=0, world_size=num_ranks, store=dist.HashStore())
    try:
        with patch.object(device.parallel_dims, "device_type", NAME):
            yield mode
    finally:
        dist.destroy_process_group()


# -- stand-ins ---------------------------------------------------------------------------------------------


@torch.library.custom_op("triquetra_plan::attention", mutates_args=())
def attention(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, which the backward pass keeps, as a fused kernel's."""
    raise NotImplementedError("it is traced, and has no kernel")


@attention.register_fake
def _(q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_BLNH), q_BLNH.new_empty(q_BLNH.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("triquetra_plan::attention_backward", mutates_args=())
def attention_backward(
    grad_BLNH: Tensor, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    raise NotImplementedError("it is traced, and has no kernel")


@attention_backward.register_fake
def _(grad_BLNH, q_BLNH, k_BLNH, v_BLNH, out, lse, window):
    return torch.empty_like(q_BLNH), torch.empty_like(k_BLNH), torch.empty_like(v_BLNH)


def _keep(ctx, inputs, output) -> None:
    *qkv, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output)


def _backward(ctx, grad_BLNH: Tensor, grad_lse: Tensor | None):
    return *torch.ops.triquetra_plan.attention_backward(grad_BLNH, *ctx.saved_tensors, ctx.window), None


attention.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("triquetra_plan::product", mutates_args=())
def product(a: Tensor, b: Tensor, num_experts: int) -> Tensor:
    """A grouped product in float32: of rows (R x K, E x K x N), or of a weight's gradient (K x R, R x N)."""
    raise NotImplementedError("it is traced, and has no kernel")


@product.register_fake
def _(a: Tensor, b: Tensor, num_experts: int) -> Tensor:
    return a.new_empty(*([num_experts] if b.ndim == 2 else []), a.shape[0], b.shape[-1])


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a_RK: Tensor, b_EKN: Tensor) -> Tensor:
        ctx.save_for_backward(a_RK, b_EKN)
        return torch.ops.triquetra_plan.product(a_RK, b_EKN, len(b_EKN))

    @staticmethod
    def backward(ctx, grad_RN: Tensor):
        a_RK, b_EKN = ctx.saved_tensors
        multiply = torch.ops.triquetra_plan.product
        return multiply(grad_RN, b_EKN.mT, len(b_EKN)), multiply(a_RK.mT, grad_RN, len(b_EKN))


def stand_in_product(module: moe.Experts, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
    """torch multiplies float32 expert by expert, each when the host knows its rows; on shapes not at all."""
    if A.dtype != torch.float32:
        return torch._grouped_mm(A, B_t, offs=offs)
    return Product.apply(A, B_t)


def attended(length: int, window: int) -> int:
    """Pairs of a query and a key it sees, in a row of `length` that is one document; window 0: none."""
    window = min(window or length, length)
    return length * window - window * (window - 1) // 2


def stand_in_attention(module: afmoe.Attention, q, k, v, **kwargs) -> Tensor:
    window = module.window if module.local else 0
    return torch.ops.triquetra_plan.attention(q, k, v, window)[0]


def stand_in_norm(self: norm.RMSNorm, x_D: Tensor) -> Tensor:
    """What F.rms_norm is on a GPU; elsewhere it falls into elementwise operators."""
    return torch.ops.aten._fused_rms_norm(x_D, list(self.weight.shape), self.weight, self.eps)[0]


def balanced_splits(self, sent_E: Tensor, received_Ee: Tensor, ep_size: int, *, watch) -> tuple:
    """Each of the ranks gets as many rows from each of the others. `watch.slots`: this rank's rows."""
    received_Ee = torch.ops._c10d_functional.wait_tensor(received_Ee)
    watch.count_wait("counts of the all-to-all")
    split = [watch.slots // ep_size] * ep_size
    return received_Ee.reshape(-1), split, split


def with_stand_ins(saved: set) -> set:
    """What a selective checkpoint keeps: attention, and products in float32 where it keeps others."""
    ours = torch.ops.triquetra_plan
    kept = {ours.product.default} if saved & recompute.GROUPED_GEMMS else set()
    return saved | {ours.attention.default} | kept


@contextmanager
def stand_ins(watch) -> Iterator[None]:
    """In place of what cannot run on shapes, while a model is built and run."""
    selective = recompute.SelectiveAC
    saved = selective.get_save_ops
    original = afmoe.Attention.__init__

    def initialise(self: afmoe.Attention, config: afmoe.Attention.Config) -> None:
        original(self, config)
        self.inner_attention.forward = partial(stand_in_attention, self)

    patches = [
        patch.object(afmoe.Attention, "__init__", initialise),
        patch.object(afmoe.FlexAttention, "mask", lambda self, *args, **kwargs: None),
        patch.object(moe.Experts, "_grouped_mm", stand_in_product),
        patch.object(norm.nn_modules.RMSNorm, "forward", stand_in_norm),
        patch.object(
            dispatch.TokenDispatcher,
            "_sync_token_count_exchange",
            lambda *args: balanced_splits(*args, watch=watch),
        ),
        patch.object(selective, "get_save_ops", lambda self: with_stand_ins(saved(self))),
    ]
    for name in FUSED:
        patches.append(patch.object(dispatch, name, watch.as_one(getattr(dispatch, name).__wrapped__)))
    with ExitStack() as stack:
        for each in patches:
            stack.enter_context(each)
        yield
