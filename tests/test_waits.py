"""How often does the host wait for a device while biases, guard and metrics are brought up to date?

Without a GPU: tensors that a GPU would hold are marked, and so is what is computed from them. The host waits
where it asks one of them for its value.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.balance import Balancer, Guard, SmebuGainRule, balancer, register_routing_buffers
from trainer.metrics import MetricsLog

LAYERS, EXPERTS, STEPS = 3, 8, 40
ASKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.top_k = 2
        register_routing_buffers(self, EXPERTS)


class Waits(TorchDispatchMode):
    """Counts them. `marked`: storages on the device; they are held, so that no other takes their place."""

    def __init__(self, *on_device: Tensor):
        super().__init__()
        self.num, self.marked = 0, {self.place(x): x for x in on_device}

    @staticmethod
    def place(x: Tensor) -> int:
        return x.untyped_storage()._cdata

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        is_asked = function._schema.name in ASKS
        of_device = any(self.place(x) in self.marked for x in inputs)
        self.num += is_asked and of_device
        result = function(*args, **(kwargs or {}))
        if of_device:
            self.marked |= {self.place(x): x for x in tree_leaves(result) if isinstance(x, Tensor)}
        return result


def test_a_step_of_the_balancer_waits_once(monkeypatch, tmp_path):
    """With guard, metrics, a tail that is counted and a rule that reports its stability: the one transfer."""
    guard = Guard((LAYERS, EXPERTS), grace=1, patience=1)
    rule = SmebuGainRule((LAYERS, EXPERTS), rho=0.3, beta=0.5, kappa=2.0)
    balance = Balancer([Layer() for _ in range(LAYERS)], rule, steps=STEPS, guard=guard)
    log = MetricsLog(tmp_path / "metrics.jsonl", steps=STEPS, interval=10)
    balance.watchers += (log.watch,)
    on_gpu = [x for layer in balance.layers for x in layer.buffers()] + list(rule.buffers())
    waits = Waits(*on_gpu, balance.load_ME, balance.tail_counts_ME, balance.tail_3)
    transfer = balancer.on_host

    def counted(parts: list[Tensor]) -> list[Tensor]:
        waits.num += 1
        return [part.clone() for part in transfer(parts)]

    monkeypatch.setattr(balancer, "on_host", lambda parts: outside(waits, counted, parts))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        for layer in balance.layers:
            layer.routing_sums_S.random_(1, 1000, generator=generator)
        before = waits.num
        with waits:
            values = balance.step(step)
        assert waits.num - before == 1, step
        log.write({"step": step, "loss": 1.0, "tokens_per_s": 1.0, **values}, alarms=guard.take_alarms())
    log.close()
    assert values["guard/alarm"] in (0.0, 1.0) and "balance/stability/0" in values
    with waits:
        torch.stack([layer.load_E for layer in balance.layers]).max().item()
    assert waits.num == STEPS + 1  # a question that is asked is counted


def outside(mode: Waits, function, *args):
    """What the transfer itself does is not watched, and what it returns lies on the host."""
    with torch.utils._python_dispatch._disable_current_modes():
        return function(*args)
