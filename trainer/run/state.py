"""What is a run made of, and what of it is in a checkpoint?

    model      weights and routing biases
    optimizer  what is kept for each parameter; hyper-parameters are those of the present configuration
    balancer   the memory of the rule, of the guard and of the verdict
    step, tokens, window, health   how far the run is, its last applied steps, its skipped steps
    stream     where each virtual stream reads, and how much all of them have read

`Run.state_dict` gives all of it as nested dicts of tensors, `Run.load_state_dict` takes it back, all of it or
some parts. Whatever saves, resumes, goes back or starts from other weights uses this pair.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard

from trainer.balance import Balancer
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.data import COUNTED, BadDocument, DataError, StreamState, TokenStream, with_slots
from trainer.metrics import Window
from trainer.model.afmoe import Afmoe
from trainer.optim import Optimizers
from trainer.program import Program
from trainer.ranks.device import ParallelDims
from trainer.ranks.local import local
from trainer.ranks.stop import StopRequest
from trainer.run.health import Health

PARTS = ("model", "optimizer", "balancer", "step", "tokens", "window", "health", "stream")


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Which ranks are alike in what? None: this rank is alone.

    documents: ranks that read other documents than this one does. What is read is counted over them.
    tokens: ranks that hold other tokens. Losses, gradients and routing counts are summed over them.

    Without context parallelism these are the same ranks. With it, the ranks of a row read the same documents
    and hold different tokens of them.
    """

    documents: dist.ProcessGroup | None = None
    tokens: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, dims: ParallelDims) -> "Groups":
        meshes = (dims.get_optional_mesh(name) for name in ("batch", "loss"))
        documents, tokens = (mesh.get_group() if mesh is not None else None for mesh in meshes)
        return cls(documents=documents, tokens=tokens)

    @property
    def reader(self) -> int:
        """Which of the `num_readers` shares of the documents this rank reads."""
        return dist.get_rank(self.documents) if self.documents is not None else 0

    @property
    def num_readers(self) -> int:
        return dist.get_world_size(self.documents) if self.documents is not None else 1

    @property
    def is_first_of_row(self) -> bool:
        """True on one of the ranks that read the same documents: a sum over `tokens` has them once.

        The ranks of a row lie side by side in `tokens`.
        """
        per_row = dist.get_world_size(self.tokens) // self.num_readers if self.tokens is not None else 1
        return self.tokens is None or dist.get_rank(self.tokens) % per_row == 0


@dataclass(kw_only=True)
class Run:
    """Everything that the loop touches."""

    config: Config
    device: torch.device
    dims: ParallelDims
    groups: Groups
    model: Afmoe
    optimizer: Optimizers
    program: Program
    balancer: Balancer
    stream: TokenStream
    stop: StopRequest
    checkpoints: Checkpoints
    health: Health
    step: int = 0
    tokens: int = 0  # trained on so far, over all ranks
    last_step: int  # where the program ends, seen from here
    window: Window = field(default_factory=Window)  # of the applied steps
    unread: BadDocument | DataError | None = None  # why this rank has no rows for the step
    about: dict[str, Any] = field(default_factory=dict)  # for the manifests of its checkpoints
    texts: dict[str, str] = field(default_factory=dict)  # files that go into each of them
    evaluations: Any = None  # trainer.evaluate.Evaluations, once the run has started
    held: TextIO | None = None  # the lock of the run's directory, on rank 0

    @property
    def directory(self) -> Path:
        return self.config.directory

    def end_at(self, last_step: int) -> None:
        self.last_step = last_step
        self.balancer.end_at(last_step)

    def state_dict(
        self,
        parts: Iterable[str] = PARTS,
        *,
        stream: StreamState | None = None,
        num_slots: int | None = None,
        num_counts: int | None = None,
    ) -> dict[str, Any]:
        """Parts of the run, as nested dicts of its own tensors: DTensors for what is cut. Collective.

        stream: of an earlier moment; None: as it is now. num_slots, num_counts: of the stream's buffers and
        counts in the checkpoint that is to be loaded into the result; None: as many as the fullest buffer of
        all ranks has, and all counts.
        """
        make = {
            "model": lambda: get_model_state_dict(self.model),
            "optimizer": lambda: optimizer_state(self.model, self.optimizer),
            "balancer": self.balancer.state_dict,
            "step": lambda: torch.tensor(self.step),
            "tokens": lambda: torch.tensor(self.tokens),
            "window": self.window.state_dict,
            "health": self.health.state_dict,
            "stream": lambda: self._stream_state(stream or self.stream.state_dict(), num_slots, num_counts),
        }
        return {part: make[part]() for part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave, on any layout. Parts that are not in `state` stay as they are.

        Raises: ValueError if the stream is not one of this run.
        """
        self.step, self.tokens = int(state.get("step", self.step)), int(state.get("tokens", self.tokens))
        self.end_at(self.program.last_step(step=self.step, position=self.tokens))
        if "model" in state:
            set_model_state_dict(self.model, state["model"])
        if "optimizer" in state:
            load_optimizer_state(self.model, self.optimizer, state["optimizer"])
        for part in ("balancer", "window", "health"):
            if part in state:
                getattr(self, part).load_state_dict(state[part])
        if "stream" in state:
            shards = {name: local(tensor).cpu() for name, tensor in state["stream"].items()}
            self.stream.load_state_dict(shards, keep_counts=self.groups.reader == 0)

    def _stream_state(
        self, own: StreamState, num_slots: int | None, num_counts: int | None
    ) -> dict[str, Tensor]:
        """The streams of all ranks in their order, cut along the ranks that read other documents, and the sum
        of their counts.
        """
        if num_slots is None:
            num_slots = int(self.over_documents(own["index_VC"].shape[1], op=dist.ReduceOp.MAX))
        counts = self.over_documents(own["counts"][:num_counts])
        mesh = self.dims.get_optional_mesh("batch")
        wide = {name: tensor.to(self.device) for name, tensor in with_slots(own, num_slots=num_slots).items()}
        if mesh is not None:
            wide = {name: DTensor.from_local(tensor, mesh, [Shard(0)]) for name, tensor in wide.items()}
        return {**wide, "counts": counts}

    def over_documents(self, numbers: Any, *, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """`numbers` of all ranks that read other documents, all-reduced. Collective."""
        numbers = torch.as_tensor(numbers).to(self.device, copy=True)
        if self.groups.documents is not None:
            dist.all_reduce(numbers, op=op, group=self.groups.documents)
        return numbers

    def documents_read(self) -> dict[str, int]:
        """What all ranks have read since the start of the run, by kind. Collective."""
        return dict(zip(COUNTED, self.over_documents(self.stream.state_counts).tolist(), strict=True))


def optimizer_state(model: nn.Module, optimizer: Optimizers) -> dict[str, Any]:
    """What the optimizers keep for each parameter, by name."""
    new = [one for one in optimizer.optimizers if not one.state]
    state = get_optimizer_state_dict(model, optimizer.optimizers)["state"]
    for one in new:  # torch makes what is missing by a step without gradient, and counts that step
        for of_parameter in one.state.values():
            for name, value in of_parameter.items():
                if name == "step":
                    value.zero_()
    return state


def load_optimizer_state(model: nn.Module, optimizer: Optimizers, state: dict[str, Any]) -> None:
    """The reverse. Hyper-parameters stay those of the present configuration."""
    kept = [{k: value for k, value in group.items() if k != "params"} for group in optimizer.param_groups]
    groups = get_optimizer_state_dict(model, optimizer.optimizers)["param_groups"]
    set_optimizer_state_dict(model, optimizer.optimizers, {"state": state, "param_groups": groups})
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
