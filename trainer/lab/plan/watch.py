"""What does a step do: FLOP, bytes that live, bytes through memory, and what ranks send each other?

Seen operator by operator, below autograd and below DTensor: on real ranks as on ranks that do not exist.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.model.moe import Experts

# What bytes grow with: ranks that share a weight, the experts that a rank holds, or its tokens.
CLASSES = ("shard", "expert shard", "whole", "expert whole", "tokens")
KINDS = ("weights", "gradients", "optimizer", "gathered", "reduced", "activations")
VIEWS_OF_NOTHING = {
    "empty", "empty_like", "new_empty", "empty_strided", "detach", "_to_copy", "_unsafe_view"
}  # fmt: skip
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount"}
SHAPES = "_propagate_tensor_meta_non_cached"
GROUPED = ("_grouped_mm", "product")
PER_PAIR = {"attention": 4, "attention_backward": 10}  # matrix products of H elements, times 2 FLOP


class Sent(NamedTuple):
    """One sort of collective in one phase: by operator, ranks and what is carried."""

    phase: str
    operator: str
    size: int  # ranks of the group
    stride: int  # from one of them to the next
    part: str  # rest | experts | tokens | counts


class Block(NamedTuple):
    """A storage that lives."""

    kind: int
    classes: np.ndarray  # shares, one for each of CLASSES
    num_bytes: int
    birth: int  # the number of moments before it
    watch: Any  # the weak reference


class Watch(TorchDispatchMode):
    """Counts while it is entered. `phase` and `kind` name what is going on."""

    def __init__(self, *, device_type: str, slots: int = 0):
        super().__init__()
        self.device_type, self.slots, self.paused = device_type, slots, False
        self.phase, self.kind, self.share, self.shard_numel = "build", "activations", None, 0
        self.place = ""  # in the model: where layers of a larger one would have run already, or not yet
        self.blocks = dict[int, Block]()
        self.live = np.zeros((len(KINDS), len(CLASSES)))
        self.moments: list[tuple[str, np.ndarray]] = []  # where more lives than before
        self.flop, self.moved, self.kernels, self.waits = Counter(), Counter(), Counter(), Counter()
        self.sent, self.calls = Counter[Sent](), Counter[Sent]()

    # -- what goes on ----------------------------------------------------------------------------------

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    @contextmanager
    def making(self, kind: str, share: float, *, shard_numel: int = 0) -> Iterator[None]:
        """What is allocated here is of this kind, and this share of it belongs to experts. shard_numel:
        of the buffers that hold a rank's part."""
        before = self.kind, self.share, self.shard_numel
        self.kind, self.share, self.shard_numel = kind, share, shard_numel
        yield
        self.kind, self.share, self.shard_numel = before

    def __enter__(self) -> "Watch":
        resize, watch = torch.UntypedStorage.resize_, self

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            watch.resized(storage)

        patches = [patch.object(torch.UntypedStorage, "resize_", resized)]
        for name, kind in {
            "unshard": "gathered",
            "wait_for_unshard": "gathered",
            "post_backward": "reduced",
        }.items():
            patches.append(
                patch.object(FSDPParamGroup, name, self._within(getattr(FSDPParamGroup, name), kind))
            )
        asked = getattr(ShardingPropagator, SHAPES)
        patches.append(patch.object(ShardingPropagator, SHAPES, self._unseen(asked)))
        self.patches = patches
        for each in patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *args) -> None:
        super().__exit__(*args)
        for each in self.patches:
            each.stop()

    def _within(self, method: Callable, kind: str) -> Callable:
        def wrapped(group: FSDPParamGroup, *args, **kwargs):
            params = [p for p in group.fsdp_params if kind == "gathered" or p.sharded_param.requires_grad]
            with self.making(kind, expert_share(params), shard_numel=shard_numel(params)):
                return method(group, *args, **kwargs)

        return wrapped

    def _unseen(self, method: Callable) -> Callable:
        """DTensor makes whole tensors to learn what shape an operator gives; nobody else does."""

        def wrapped(*args, **kwargs):
            before, self.paused = self.paused, True
            try:
                return method(*args, **kwargs)
            finally:
                self.paused = before

        return wrapped

    def as_one(self, function: Callable) -> Callable:
        """A function that is compiled to one kernel: nothing between its arguments and its results is in
        memory."""

        def wrapped(*args):
            before, self.paused = self.paused, True
            try:
                out = function(*args)
            finally:
                self.paused = before
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.kernels[self.phase] += 1
            self.moved[self.phase, "other"] += sum(t.numel() * t.element_size() for t in tensors)
            for tensor in tree_leaves(out):
                self.see(tensor)
            return out

        return wrapped

    # -- what lives --------------------------------------------------------------------------------------

    def classes(self, tensor: Tensor) -> tuple[int, np.ndarray]:
        """Kind and classes of what `tensor` is the first view of."""
        kind, classes = self.kind, np.zeros(len(CLASSES))
        numel = tensor.untyped_storage().nbytes() // tensor.element_size()
        if kind in ("weights", "gradients", "optimizer") or 0 < numel == self.shard_numel:
            kind = "gradients" if kind == "reduced" else kind
            classes[0:2] = 1 - self.share, self.share
        elif kind in ("gathered", "reduced"):
            classes[2:4] = 1 - self.share, self.share
        elif numel in self.expert_numels:
            kind, classes[3] = "reduced", 1
        elif numel in self.numels or self.is_chunk(numel):
            kind, classes[2] = "reduced" if numel in self.numels else kind, 1
        else:
            classes[4] = 1
        return KINDS.index(kind), classes

    def is_chunk(self, numel: int) -> bool:
        """Logits of some of the tokens: as many of them whatever the microbatch."""
        return numel % self.vocab_size == 0 and 1 < numel // self.vocab_size < self.tokens

    tokens, vocab_size = 0, 1
    numels: frozenset[int] = frozenset()  # of weights as a layer sees them, whose gradients are as large
    expert_numels: frozenset[int] = frozenset()

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if (block := self.blocks.get(key)) is not None:
            if block.num_bytes != size:
                self._change(key, block, size)
            return
        kind, classes = self.classes(tensor)
        reference = weakref.ref(storage, lambda _: self.gone(key))
        self.blocks[key] = Block(kind, classes, size, len(self.moments), reference)
        self.live[kind] += size * classes
        self.moment()

    def _change(self, key: int, block: Block, size: int) -> None:
        self.live[block.kind] += (size - block.num_bytes) * block.classes
        self.blocks[key] = block._replace(num_bytes=size)
        if size > block.num_bytes:
            self.moment()

    def moment(self) -> None:
        """What lives now, where it is more than what lived at this place before."""
        total = self.live.sum()
        if total > 0 and self.phase != "build":
            self.moments.append((f"{self.place} {self.phase}", self.live.copy()))

    def gone(self, key: int) -> None:
        if (block := self.blocks.pop(key, None)) is not None:
            self.live[block.kind] -= block.num_bytes * block.classes

    def resized(self, storage: torch.UntypedStorage) -> None:
        if (block := self.blocks.get(storage._cdata)) is not None:
            self._change(storage._cdata, block, storage.nbytes())

    def rename(self, tensors: list[tuple[Tensor, float]], kind: str) -> None:
        """From here on these storages are of another kind; the share is that of experts: 0 or 1."""
        for tensor, share in tensors:
            key = tensor.untyped_storage()._cdata
            if (block := self.blocks.get(key)) is None:
                continue
            classes = np.zeros(len(CLASSES))
            classes[0:2] = 1 - share, share
            self.live[block.kind] -= block.num_bytes * block.classes
            block = block._replace(kind=KINDS.index(kind), classes=classes)
            self.live[block.kind] += block.num_bytes * block.classes
            self.blocks[key] = block

    # -- what is done ------------------------------------------------------------------------------------

    def count_wait(self, what: str) -> None:
        self.waits[self.phase, what] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented  # what it does to its local part comes by here
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if self.paused:
            return out
        name = func._overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collective(func, name, args, kwargs)
        elif func.namespace != "prim":
            self.operator(func, name, args, kwargs, out, results)
        for tensor in results:
            if tensor.device.type == self.device_type and not isinstance(tensor, DTensor):
                self.see(tensor)  # the storage of a DTensor has the whole tensor's size, and is not there
        return out

    def operator(self, func, name: str, args, kwargs, out, results: list[Tensor]) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(tensor.device.type == self.device_type for tensor in inputs + results):
            return
        to_host = name == "_to_copy" and results[0].device.type != self.device_type
        if name in WAITS or (to_host and not kwargs.get("non_blocking")):
            self.count_wait(name)
        if name == "product":
            self.count_wait("rows of experts")
        if flop := flop_of(func, name, args, kwargs, out):
            self.flop[self.phase, part_of(name, args)] += flop
        if func.is_view or (name in VIEWS_OF_NOTHING and name != "_to_copy"):
            return
        self.kernels[self.phase] += args[-1] if name == "product" else 1  # one for each expert
        moved = sum(tensor.numel() * tensor.element_size() for tensor in inputs + results)
        if self.share is None or self.kind not in ("gathered", "reduced"):
            self.moved[self.phase, part_of(name, args).split()[0] if flop else "other"] += moved
            return
        self.moved[self.phase, "copies rest"] += moved * (1 - self.share)
        self.moved[self.phase, "copies experts"] += moved * self.share

    def collective(self, func, name: str, args, kwargs) -> None:
        if name not in OPERATORS:  # a wait, a barrier
            return
        group = group_of(args, kwargs)
        ranks = dist.get_process_group_ranks(group)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        size = max(tensor.numel() * tensor.element_size() for tensor in tensors)
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 0
        operator = OPERATORS[name]
        parts = {"tokens" if operator == "all-to-all" else "rest": 1.0}
        if not tensors[0].is_floating_point():
            parts = {"counts": 1.0}
        elif self.share is not None:
            parts = {"rest": 1 - self.share, "experts": self.share}
        for part, fraction in parts.items():
            if fraction:
                key = Sent(self.phase, operator, len(ranks), stride, part)
                self.sent[key] += size * fraction
                self.calls[key] += 1


OPERATORS = {
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
}


def expert_share(params: list[FSDPParam]) -> float:
    """Of the elements that a group gathers, or reduces, those of routed experts."""
    sizes = Counter[bool]()
    for param in params:
        sizes[isinstance(param._module_info.module, Experts)] += param._orig_size.numel()
    return sizes[True] / max(1, sizes.total())


def shard_numel(params: list[FSDPParam]) -> int:
    """Elements of this rank's part of them."""
    return sum(param._sharded_param_data.numel() for param in params)


def group_of(args, kwargs) -> dist.ProcessGroup:
    for leaf in tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, torch.ScriptObject)):
        if isinstance(leaf, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(leaf)
            except (RuntimeError, TypeError):  # a reduction operator
                continue
        if isinstance(leaf, dist.ProcessGroup):
            return leaf
    names = [leaf for leaf in args if isinstance(leaf, str)]
    return dist.distributed_c10d._resolve_process_group(names[-1])


def part_of(name: str, args) -> str:
    """attention: with the window that its pairs are within (0: none)."""
    if name in PER_PAIR:
        return f"attention {args[-1]}"
    return "experts" if name in GROUPED else "matmul"


def flop_of(func, name: str, args, kwargs, out) -> float:
    """Of attention: for each pair of a query and a key."""
    if name in PER_PAIR:
        num_rows, _, heads, width = args[0].shape
        return PER_PAIR[name] * heads * width * num_rows
    if name in GROUPED:
        a, b = args[0], args[1]
        return 2 * a.shape[0] * a.shape[1] * b.shape[-1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)  # addmm_ is an addmm
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    return 0
