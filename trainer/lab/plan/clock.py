"""How long does a step take, what hides behind what, and what bounds it?

A phase takes as long as the longest of what runs beside each other in it: the GPU's work with the waits for
the experts' all-to-all, the network, NVLink, and the host that launches kernels. Each is bytes or FLOP over a
speed of configs/device: there is no factor of a model's own.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from trainer.config import Config
from trainer.lab.plan.fake import attended
from trainer.lab.plan.hardware import Hardware
from trainer.lab.plan.keys import Keys
from trainer.lab.plan.layout import Layout, Memory, Traffic, memory, sent_on, traffic
from trainer.lab.plan.optimizer import OptimizerStep, OptimizerSteps
from trainer.lab.plan.whole import Whole
from trainer.program import StepSettings

PHASES = ("forward", "backward")
LEFT_OF_KERNELS = 0.35  # of launches, with compile=true [assumed]
WEIGHT_PASSES = {"forward": 1, "backward": 3}  # over the gathered experts: read; read and written


class Phase(NamedTuple):
    """[s] of one phase of a microbatch, or of the optimizer's step."""

    name: str
    parts: dict[str, float]  # of the GPU: matmul, experts, attention, memory, all-to-all
    nvlink: float
    nic: float
    host: float

    @property
    def gpu(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        return max(self.gpu, self.nvlink, self.nic, self.host)

    @property
    def bound(self) -> str:
        times = {"NIC": self.nic, "NVLink": self.nvlink, "host": self.host, "GPU": self.gpu}
        return max(times, key=times.get)

    @property
    def exposed(self) -> float:
        """[s] of communication that nothing hides."""
        return self.seconds - max(self.gpu - self.parts.get("all-to-all", 0.0), self.host)


@dataclass(frozen=True)
class Step:
    """Of one layout, in one span."""

    layout: Layout
    now: StepSettings
    accumulation: int
    memory: Memory
    phases: tuple[Phase, ...]  # forward, backward, last backward, optimizer
    flop: Counter  # of a rank and step, by part
    traffic: dict[str, Traffic]  # of a rank and step, by collective

    @property
    def seconds(self) -> float:
        forward, backward, last, optimizer = (phase.seconds for phase in self.phases)
        return self.accumulation * forward + (self.accumulation - 1) * backward + last + optimizer

    @property
    def tokens_per_s(self) -> float:
        return self.now.tokens / self.seconds

    def times(self) -> dict[str, float]:
        """[s] of a step by what bounds it."""
        by_bound = Counter()
        n = self.accumulation
        for phase, count in zip(self.phases, (n, n - 1, 1, 1), strict=True):
            by_bound[phase.bound] += count * phase.seconds
        return dict(by_bound)

    @property
    def bound(self) -> str:
        return max(self.times(), key=self.times().get)


class Clock:
    """What of a run's plan is the same for all layouts: the model, the device, the run's settings."""

    def __init__(self, config: Config, hardware: Hardware, *, imbalance: float):
        self.config, self.hardware, self.imbalance = config, hardware, imbalance
        self.optimizer = OptimizerSteps(config)

    def speed(self, kind: str) -> float:
        """[FLOP/s] of a kind of work in the dtype that the run does it in."""
        c = self.config
        dtype = "float32" if c.dtype == "float32" else "bfloat16"
        return self.hardware.speed(kind, (c.model.expert_dtype if kind == "experts" else None) or dtype)

    def step(self, layout: Layout, whole: Whole, now: StepSettings) -> Step:
        """now: of the span, with the layout's micro_batch or its own."""
        tokens = layout.micro_batch * now.seq_len // layout.cp
        accumulation = max(1, now.global_batch // (layout.readers * layout.micro_batch))
        keys, optimizer = Keys(self.config, layout, now), self.optimizer.on(layout.degrees)
        needs = memory(
            layout,
            whole,
            optimizer,
            self.hardware,
            tokens=tokens,
            accumulation=accumulation,
            fetched=keys.kept,
        )
        sent = sent_on(layout, whole, tokens=tokens) + keys.sent
        flop = self.flop(whole, now, layout)
        phases = [self.phase(name, layout, whole, flop, sent, tokens=tokens) for name in PHASES]
        last = self.phase("backward", layout, whole, flop, sent, tokens=tokens, with_replicas=True)
        per_step = Counter()
        for (_, part), n in flop.items():
            per_step[part] += n * accumulation
        per_step["optimizer"] = optimizer.flop
        return Step(
            layout,
            now,
            accumulation,
            needs,
            (*phases, last, self.optimizer_phase(optimizer)),
            per_step,
            self.links(sent, optimizer.sent, accumulation),
        )

    def flop(self, whole: Whole, now: StepSettings, layout: Layout) -> Counter:
        """[FLOP] of a microbatch by phase and part."""
        by_token = layout.micro_batch * now.seq_len / layout.cp / whole.tokens
        flop = Counter()
        for (phase, part), value in whole.flop.items():
            name, _, window = part.partition(" ")
            per = by_token
            if window:
                per = layout.micro_batch * attended(now.seq_len, int(window)) / layout.cp
            flop[phase, name] += value * per
        return flop

    def phase(
        self,
        name: str,
        layout: Layout,
        whole: Whole,
        flop: Counter,
        sent: Counter,
        *,
        tokens: int,
        with_replicas=False,
    ) -> Phase:
        h, by_token = self.hardware, tokens / whole.tokens
        compiled = self.config.compile
        gathered = sum(
            n for key, n in sent.items() if key[:2] == (name, "all-gather") and key.part == "experts"
        )
        per_expert = WEIGHT_PASSES[name] * gathered / h.speed("hbm")
        elementwise = whole.moved[name, "other"] * by_token * (h.fused.value if compiled else 1.0)
        copies = whole.moved[name, "copies rest"]
        copies += whole.moved[name, "copies experts"] * whole.degrees[2] / layout.ep
        busiest = 1 + self.imbalance if layout.ep > 1 else 1.0
        parts = {
            "matmul": flop[name, "matmul"] / self.speed("matmul"),
            "experts": max(busiest * flop[name, "experts"] / self.speed("experts"), per_expert),
            "attention": flop[name, "attention"] / self.speed("attention"),
            "memory": (elementwise + copies) / h.speed("hbm"),
            "all-to-all": 0.0,
        }
        nvlink = nic = 0.0
        for key, num_bytes in sent.items():
            if key.phase != name or (key.operator == "all-reduce" and not with_replicas):
                continue
            links = traffic(key, num_bytes, per_node=int(h.per_node.value))
            if key.operator == "all-to-all":
                seconds = links.nic / h.speed("all_to_all_nic"), links.nvlink / h.speed("all_to_all_nvlink")
                parts["all-to-all"] += (busiest if key.part == "tokens" else 1.0) * max(seconds)
                nic, nvlink = nic + seconds[0], nvlink + seconds[1]
            else:
                nic, nvlink = nic + links.nic / h.speed("nic"), nvlink + links.nvlink / h.speed("nvlink")
        kernels = whole.kernels[name] * (LEFT_OF_KERNELS if compiled else 1.0)
        waits = sum(n for (phase, _), n in whole.waits.items() if phase == name)
        return Phase(name, parts, nvlink, nic, kernels * h.launch_s.value + waits * h.wait_s.value)

    def optimizer_phase(self, step: OptimizerStep) -> Phase:
        h, links = self.hardware, Traffic()
        for key, num_bytes in step.sent.items():
            links += traffic(key, num_bytes, per_node=int(h.per_node.value))
        parts = {
            "matmul": step.flop / self.hardware.speed("matmul", self.optimizer.dtype),
            "memory": step.moved / h.speed("hbm"),
        }
        host = step.kernels * h.launch_s.value
        return Phase("optimizer", parts, links.nvlink / h.speed("nvlink"), links.nic / h.speed("nic"), host)

    def links(self, sent: Counter, by_optimizer: Counter, accumulation: int) -> dict[str, Traffic]:
        links = dict[str, Traffic]()
        per_node = int(self.hardware.per_node.value)
        for key, num_bytes in (sent + by_optimizer).items():
            is_optimizer = key.phase == "optimizer"
            times = 1 if key.operator == "all-reduce" or is_optimizer else accumulation
            name = f"{key.operator} of {'the optimizer' if is_optimizer else key.part}"
            links[name] = links.get(name, Traffic()) + traffic(key, num_bytes, per_node=per_node).times(times)
        return links
