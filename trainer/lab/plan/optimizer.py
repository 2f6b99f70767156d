"""What does the optimizer's step cost a rank, on any mesh?

What it does to each element, a rank does to its share: that is traced once, of a whole model on one rank.
What Muon does to whole matrices depends on the mesh, which says who owns them and what travels: its rounds
run on outlines, for each mesh.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.config import Config
from trainer.lab.plan import fake
from trainer.lab.plan.outline import Ledger, Outline
from trainer.lab.plan.watch import KINDS, Sent, Watch
from trainer.lab.plan.whole import are_cut_inside, group_of
from trainer.model.afmoe import afmoe_config
from trainer.model.frozen import train_only
from trainer.model.moe import Experts
from trainer.optim import Muon
from trainer.optim.plan import Item, Plan, Spread
from trainer.ranks.local import scale_gradients, squared_gradient_norm, trained
from trainer.run.build import build_optimizer, refusing

Degrees = tuple[int, int, int]  # dp_replicate, shards, ep


@dataclass(frozen=True)
class OptimizerStep:
    """Of the whole model, on rank 0 of a mesh, once its state is there."""

    state: float  # [bytes] that stay
    peak: float  # [bytes] at most beside weights, gradients and state
    flop: float
    moved: float  # [bytes] through memory
    kernels: int
    sent: Counter  # of Sent


class Matrix(NamedTuple):
    """A parameter that Muon trains."""

    shape: tuple[int, ...]
    is_of_experts: bool


class OptimizerSteps:
    """Of a configuration; each mesh is counted when it is first asked for."""

    def __init__(self, config: Config) -> None:
        self.known = dict[Degrees, OptimizerStep]()
        self.num_experts = config.model.num_experts
        self.elements, self.by_muon, self.trained = elementwise(config)
        dtypes = [dtype for _, dtype in self.by_muon]
        self.dtype = "float32" if torch.float32 in dtypes else "bfloat16"  # of its products

    def on(self, degrees: Degrees) -> OptimizerStep:
        if degrees not in self.known:
            self.known[degrees] = self.counted(degrees)
        return self.known[degrees]

    def counted(self, degrees: Degrees) -> OptimizerStep:
        every, shards = self.elements, degrees[1]
        ledger, sent = Ledger(), Counter[Sent]()
        for matrices, dtype in self.by_muon:
            run_rounds(matrices, dtype, degrees, ledger, sent, num_experts=self.num_experts)
        return OptimizerStep(
            every.state / shards,
            max(every.peak / shards, ledger.peak),
            every.flop / shards + ledger.flop,
            every.moved / shards + ledger.moved,
            every.kernels + ledger.kernels,
            sent,
        )


# -- of each element -----------------------------------------------------------------------------------------


Muons = list[tuple[list[Matrix], torch.dtype]]


def elementwise(config: Config) -> tuple[OptimizerStep, Muons, float]:
    """run/step.train_step from the gradient's norm on, without Muon's rounds, on one rank that has it all;
    what those rounds are about; the share of the parameters that is trained.
    """
    mode = fake.fake_mode()
    with torch.device("meta"):
        net = afmoe_config(config.model, flex=False).build()
    if config.train_only is not None:
        with refusing():
            train_only(net, config.train_only)
    watch = Watch(device_type=fake.NAME)
    with mode, watch, patch.object(Muon, "plans", ()):
        net.to_empty(device=fake.NAME)
        for p in trained(net):
            p.grad = torch.empty_like(p)
        optimizer = build_optimizer(config, net)
        with watch.making("optimizer", 0.0):
            state, peak = first_step(watch, optimizer)
            with watch.during("optimizer"):
                squared_gradient_norm(net)
                scale_gradients(net, 1.0)
                optimizer.step()
    flop, moved = (
        sum(n for (phase, _), n in counted.items() if phase == "optimizer")
        for counted in (watch.flop, watch.moved)
    )
    step = OptimizerStep(state, peak, flop, moved, watch.kernels["optimizer"], Counter())
    share = sum(p.numel() for p in trained(net)) / sum(p.numel() for p in net.parameters())
    return step, [matrices_of(net, each) for each in optimizer.optimizers if isinstance(each, Muon)], share


def first_step(watch: Watch, optimizer) -> tuple[float, float]:
    """[bytes] that stay, and that are there at most beside them."""
    before = watch.live.sum()
    watch.moments.clear()
    with watch.during("first step"):
        optimizer.step()
    state = watch.live.sum() - before
    return state, transient(watch, before)


def transient(watch: Watch, before: float) -> float:
    """[bytes] at most beside what was there before and what stays, as if that had been there all along."""
    stays = [0.0] * (len(watch.moments) + 1)
    for block in watch.blocks.values():
        if block.kind == KINDS.index("optimizer"):
            stays[block.birth] += block.num_bytes
    most = total = 0.0
    for (_, live), more in zip(watch.moments, stays, strict=False):
        total += more
        most = max(most, live.sum() - before - total)
    return most


def matrices_of(net: nn.Module, optimizer: Muon) -> tuple[list[Matrix], torch.dtype]:
    experts = {p for module in net.modules() if isinstance(module, Experts) for p in module.parameters()}
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    return [Matrix(tuple(p.shape), p in experts) for p in parameters], optimizer.dtype


# -- of whole matrices ---------------------------------------------------------------------------------------


class Axes(Spread):
    """mesh: the number of ranks by axis; this rank is the first on each."""

    def along(self, axis: str | None) -> tuple[str | None, int, int]:
        return (None, 1, 0) if axis is None else (axis, self.mesh[axis], 0)


def spread_of(matrix: Matrix, degrees: Degrees, *, num_experts: int) -> tuple[str, bool]:
    """The axis that a parameter is spread over, and whether that cuts inside its matrices."""
    axis = "efsdp" if matrix.is_of_experts and degrees[2] > 1 else "fsdp"
    is_whole = matrix.is_of_experts and not are_cut_inside(degrees, num_experts)
    return axis, group_of(axis, degrees)[0] > 1 and not is_whole


def run_rounds(
    matrices: list[Matrix],
    dtype: torch.dtype,
    degrees: Degrees,
    ledger: Ledger,
    sent: Counter[Sent],
    *,
    num_experts: int,
) -> None:
    """One step of Muon after the momentum: trainer/optim/plan.Plan as it is."""
    replicate, _, ep = degrees
    alike = dict[tuple[str, bool], list[Matrix]]()
    for matrix in matrices:
        alike.setdefault(spread_of(matrix, degrees, num_experts=num_experts), []).append(matrix)
    there = Outline((), torch.float32, ledger.allocate(0))
    for (axis, is_cut), group in alike.items():
        size, _ = group_of(axis, degrees)
        pieces = dict[Outline, Outline]()
        for *batch, rows, columns in (matrix.shape for matrix in group):
            local = [-(-n // ep // (1 if is_cut else size)) for n in batch]
            whole = there.seen((*local, rows, columns))
            pieces[whole] = there.seen((*local, -(-rows // size) if is_cut else rows, columns))
        mesh = {"dp_replicate": replicate, axis: size}
        spread = Axes(mesh, axis if is_cut else None, -2, "dp_replicate" if replicate > 1 else None)

        def direction(item: Item, pieces=pieces) -> Outline:
            piece = item.of(pieces[item.parameter])  # of the gradient, and alike of the momentum
            return piece.add(piece).to(dtype)

        def apply(item: Item, update: Outline, pieces=pieces) -> None:
            item.of(pieces[item.parameter]).add_(update)

        with collectives_counted(degrees, sent):
            Plan(spread, list(pieces), dtype=dtype).run(direction, apply)


@contextmanager
def collectives_counted(degrees: Degrees, sent: Counter[Sent]) -> Iterator[None]:
    """Groups are names of axes."""

    def count(operator: str, axis: str, num_bytes: int) -> None:
        sent[Sent("optimizer", operator, *group_of(axis, degrees), "rest")] += num_bytes

    def all_to_all(received: Outline, given: Outline, *splits, group: str) -> None:
        count("all-to-all", group, max(received.num_bytes, given.num_bytes))

    def all_gather(received: Outline, given: Outline, *, group: str, async_op: bool) -> "Done":
        count("all-gather", group, received.num_bytes)
        return Done()

    with (
        patch.object(dist, "all_to_all_single", all_to_all),
        patch.object(dist, "all_gather_single", all_gather),
    ):
        yield


class Done:
    def wait(self) -> None:
        pass
