"""Is bfloat16 on a CPU what it says: float32 weights, FSDP's bits, one cast a step, resumed bit for bit?"""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention.flex_attention import and_masks
from torchtitan.models.common.attention import get_causal_mask_mod, get_sliding_window_mask_mod

from tests.layouts import BASE, GLOBAL_BATCH, SEQ_LEN, STEPS, batches, full
from tests.ranks import run_ranks
from trainer import train
from trainer.config import ConfigError, load
from trainer.data import Batch
from trainer.model import attention, parallelize
from trainer.model.afmoe import moe_layers
from trainer.model.attention import MaskedSDPA
from trainer.model.casts import cast_weights, num_casts
from trainer.model.dispatch import BLOCK, LocalPaddedDispatcher
from trainer.model.hardware import CPU_ROWS, dispatch_of
from trainer.model.moe import _SwigluLoop
from trainer.model.norm import RMSNorm
from trainer.optim import Optimizers
from trainer.ranks import device
from trainer.ranks.device import Hardware

BF16 = torch.bfloat16
EPS = torch.finfo(BF16).eps  # 2^-7: two neighbours differ by as much at most, relative


def step_of(run: train.Run, step: int) -> dict[str, float]:
    """On this rank's rows of the batch that all layouts are given."""
    per_rank = GLOBAL_BATCH // dist.get_world_size()
    mine = [plane[dist.get_rank() * per_rank :][:per_rank] for plane in batches(step)]
    parts = zip(*(plane.split(run.config.micro_batch) for plane in mine), strict=True)
    return train.train_step(run, [Batch(*part) for part in parts])


def worker(overrides: list[str], wrap: bool) -> dict:
    if wrap:
        parallelize.DEVICE_TYPE = "cuda"  # in this process: one rank is wrapped as it is there
    run = train.build(load([*BASE, "dtype=bfloat16", *overrides]))
    result: dict = {"counts": []}
    step_weights, balance = run.optimizer.step, run.balancer.step

    def with_gradients() -> None:
        result.setdefault("gradients", {name: full(p.grad) for name, p in run.model.named_parameters()})
        step_weights()

    def with_counts(step: int) -> dict[str, float]:
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in moe_layers(run.model)])
        dist.all_reduce(counts_ME)
        result["counts"].append(counts_ME)
        return balance(step)

    run.optimizer.step, run.balancer.step = with_gradients, with_counts
    result["metrics"] = [step_of(run, step) for step in range(STEPS)]
    result["weights"] = {name: full(p) for name, p in run.model.named_parameters()}
    result["casts"], result["dtypes"] = num_casts(run.model), {p.dtype for p in run.model.parameters()}
    return result


@cache
def trained(num_ranks: int, *overrides: str, wrap: bool = False) -> list[dict]:
    return run_ranks(worker, num_ranks, list(overrides), wrap)


# -- the whole step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["activation_checkpoint=full", "optim=muon"]], ids=["plain", "again"])
def test_a_lone_rank_has_the_bits_of_fsdp(more):
    """FSDP is the oracle: it casts what it gathers, for each of the four microbatches."""
    [own], [wrapped] = trained(1, "micro_batch=2", *more), trained(1, "micro_batch=2", *more, wrap=True)
    assert own["metrics"] == wrapped["metrics"] and wrapped["casts"] == 0
    for part in ("gradients", "weights"):
        assert own[part].keys() == wrapped[part].keys()
        assert all(torch.equal(own[part][name], wrapped[part][name]) for name in own[part]), part


def test_weights_stay_float32_and_are_cast_once_a_step():
    """Four microbatches a step; a cast for each of them would make four times as many."""
    [result] = trained(1, "micro_batch=2")
    assert result["dtypes"] == {torch.float32}
    assert result["casts"] == STEPS * len(result["weights"])


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [
        (2, ["parallel=fsdp", "micro_batch=2"]),
        pytest.param(4, ["parallel=hsdp_ep", "micro_batch=2"], marks=pytest.mark.slow),
    ],
    ids=["fsdp", "hsdp_ep"],
)
def test_ranks_equal_one_rank_within_bfloat16(num_ranks, layout):
    """The losses of the first step within 2^-12, the gradients of each weight within 2^-6 of their norm: a
    rank rounds its share of a gradient, and shares are added in float32. All tokens are counted; the ranks
    have the same bits."""
    [one], many = trained(1, "micro_batch=8"), trained(num_ranks, *layout)
    assert all(each["metrics"] == many[0]["metrics"] for each in many)
    first, expected = many[0]["metrics"][0], one["metrics"][0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=2**-12)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-8)
    for name, gradient in one["gradients"].items():
        error = (many[0]["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 2**-6, (name, error)
    for counts_ME in one["counts"] + many[0]["counts"]:
        assert (counts_ME.sum(-1) == GLOBAL_BATCH * SEQ_LEN * 2).all()  # K = 2


def test_it_learns_what_float32_learns():
    [half], [whole] = trained(1, "micro_batch=8"), trained(1, "micro_batch=8", "dtype=float32")
    for step, (a, b) in enumerate(zip(half["metrics"], whole["metrics"], strict=True)):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3), step
        assert a["loss"] != b["loss"]


def test_a_resumed_run_has_the_same_bits():
    def resumed() -> list[list[dict[str, float]]]:
        settings = [*BASE, "dtype=bfloat16", "micro_batch=2"]
        run = train.build(load(settings))
        through = [step_of(run, step) for step in range(3)]
        first = train.build(load(settings))
        step_of(first, 0)
        other = train.build(load([*settings, "seed=1"]))
        step_of(other, 1)  # so it has copies of other weights
        parts = ["model", "optimizer", "balancer", "step", "tokens", "window", "health"]
        other.load_state_dict(first.state_dict(parts))
        other.config = first.config
        return [through[1:], [step_of(other, step) for step in range(1, 3)]]

    [(through, after)] = run_ranks(resumed, 1)
    assert through == after


# -- its parts ---------------------------------------------------------------------------------------------


class Careless(torch.optim.Optimizer):
    """As some in the wild do, it writes where autograd does not look."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.add_(1.0)


def test_no_optimizer_leaves_a_stale_copy():
    layer = nn.Linear(4, 3, bias=False)
    names = list(layer.state_dict())
    cast_weights(layer, BF16)
    for optimizer in (Careless(layer.parameters()), torch.optim.AdamW(layer.parameters(), fused=True)):
        before = layer.weight.clone()
        assert before.dtype == BF16
        layer._parameters["weight"].grad = torch.ones(3, 4)
        Optimizers(optimizer).step()
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.weight, layer._parameters["weight"].bfloat16())
    assert list(layer.state_dict()) == names and layer.state_dict()["weight"].dtype == torch.float32


def masks_of(rows: int, length: int, window: int | None) -> attention.Blocks:
    causal = get_causal_mask_mod()
    mod = causal if window is None else and_masks(causal, get_sliding_window_mask_mod(window))
    whole = [range(length)]
    attends = MaskedSDPA(MaskedSDPA.Config(dtype=BF16))
    return attends.mask(mod, rows, whole, whole, window=window, device=torch.device("cpu"))


def attended(inputs: list[Tensor], masks: attention.Blocks, grad: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = MaskedSDPA(MaskedSDPA.Config())(*leaves, attention_masks=masks, enable_gqa=True)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("window", [None, 100])
def test_attention_and_its_gradients_are_those_of_float32(window, monkeypatch):
    """The oracle is torch's kernel on the same numbers in float32; three blocks, four heads share a key."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, 300, heads, 16, generator=generator).bfloat16() for heads in (8, 2, 2, 8))
    masks = masks_of(2, 300, window)
    expected = attended([x.float() for x in (q, k, v)], masks, grad)
    kept = attended([q, k, v], masks, grad)
    for name, got, exact in zip("oqkv", kept, expected, strict=True):
        assert got.dtype == BF16 and got.shape == exact.shape
        assert (got.float() - exact).norm() < EPS * exact.norm(), name
    monkeypatch.setattr(attention, "MOST_SHARES", 0)  # long rows: nothing is kept, and all made once more
    assert all(torch.equal(a, b) for a, b in zip(attended([q, k, v], masks, grad), kept, strict=True))


def test_the_norm_is_float32_inside():
    """The oracle is the formula in float64 on the same bfloat16 numbers, through autograd."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(3, 50, 24, generator=generator).bfloat16() for _ in range(2))
    gain = torch.rand(24, generator=generator).bfloat16()
    norm = RMSNorm.Config(normalized_shape=24, eps=1e-5).build().bfloat16()
    norm.weight.data = gain
    ours, exact, exact_gain = x.clone().requires_grad_(), x.double().requires_grad_(), gain.double()
    exact_gain.requires_grad_()
    expected = exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * exact_gain
    expected.backward(grad.double())
    out = norm(ours)
    out.backward(grad)
    pairs = [(out, expected), (ours.grad, exact.grad), (norm.weight.grad, exact_gain.grad)]
    for got, want in pairs:
        assert ((got.double() - want).abs() <= EPS / 2 * want.abs() + 1e-3 * EPS).all()


def test_experts_in_a_loop_are_those_of_float32():
    """One expert has no rows, and eight rows at the end are nobody's: their gradient is never read."""
    sizes, generator = torch.tensor([32, 0, 64]), torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator) for shape in [(104, 16), *[(3, 24, 16)] * 3]]
    inputs[2] = inputs[2].mT.contiguous()
    results = []
    for dtype in (BF16, torch.float32):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in inputs]
        out = _SwigluLoop.apply(*leaves, sizes)
        out[:96].sum().backward()
        results.append([out[:96].detach(), leaves[0].grad[:96], *(leaf.grad for leaf in leaves[1:])])
    for got, exact in zip(*results, strict=True):
        assert got.dtype == BF16 and (got.float() - exact).norm() < 2 * EPS * exact.norm()
    assert all((grad[1] == 0).all() for grad in results[0][2:])


def test_rows_of_one_rank_go_out_and_come_back_like_a_loop():
    """The oracle is a loop over tokens in float64, through autograd; an expert multiplies by a number of its
    own, and expert 3 has no rows. The rows of padding get a gradient of 0, so no expert learns from them.
    """
    generator = torch.Generator().manual_seed(0)
    T, K, E, D = 300, 3, 8, 16
    x, grad = (torch.randn(T, D, generator=generator).bfloat16() for _ in range(2))
    gates = torch.rand(T, K, generator=generator)
    order_TE = torch.rand(T, E, generator=generator).index_fill_(1, torch.tensor([3]), -1).argsort(1)
    ids, factors = order_TE[:, -K:], 2.0 ** torch.arange(E)
    exact_x, exact_gates = (each.double().requires_grad_() for each in (x, gates))
    expected = torch.stack(
        [sum(exact_gates[t, k] * factors[ids[t, k]] * exact_x[t] for k in range(K)) for t in range(T)]
    )
    expected.backward(grad.double())

    dispatcher = LocalPaddedDispatcher.Config(num_experts=E, top_k=K, multiple=32).build()
    ours, our_gates = x.clone().requires_grad_(), gates.clone().requires_grad_()
    sizes_E = torch.bincount(ids.flatten(), minlength=E)
    rows_PD, padded_E, metadata = dispatcher.dispatch(ours, our_gates, ids, sizes_E)
    assert len(rows_PD) > BLOCK and (padded_E % 32 == 0).all()
    assert ((padded_E - sizes_E >= 0) & (padded_E - sizes_E < 32)).all() and padded_E[3] == 0
    rows_PD.retain_grad()
    factors_R = factors.repeat_interleave(padded_E)
    factors_P = torch.cat([factors_R, torch.zeros(len(rows_PD) - len(factors_R))]).bfloat16()
    out = dispatcher.combine(rows_PD * factors_P.unsqueeze(1), metadata, ours)
    out.backward(grad)
    starts_E, real = padded_E.cumsum(0) - padded_E, torch.zeros(len(rows_PD), dtype=torch.bool)
    for start, size in zip(starts_E.tolist(), sizes_E.tolist(), strict=True):
        real[start : start + size] = True
    assert (rows_PD.grad[~real] == 0).all() and (rows_PD.grad[real] != 0).any(1).all()
    for got, want in ((out, expected), (ours.grad, exact_x.grad)):
        assert got.dtype == BF16 and (got.double() - want).norm() < EPS / 2 * want.norm()
    assert torch.allclose(our_gates.grad, exact_gates.grad.float(), rtol=1e-5, atol=1e-5 * factors.max())


def test_rows_of_an_expert_come_in_few_numbers():
    """oneDNN makes a kernel for each number of rows, and there is another in each step."""
    for dtype, rows in (("bfloat16", CPU_ROWS), ("float32", 1)):
        config = load([*BASE, "micro_batch=2", f"dtype={dtype}"])
        assert dispatch_of(config, Hardware("cpu"), max_tokens=8).multiple == rows
        assert dispatch_of(config, Hardware("cuda", (9, 0)), max_tokens=8).multiple == 1


# -- auto --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("has", "dtype"),
    [({"avx512_bf16": True}, "bfloat16"), ({"avx512_bf16": False, "avx2": True}, "float32"), ({}, "float32")],
)
def test_auto_is_what_the_processor_multiplies_fast(has, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(device, "DEVICE_TYPE", "cpu")
    config = load([*BASE, "micro_batch=2", "dtype=auto"])
    assert device.settled(config).dtype == dtype and config.dtype == "auto"
    assert device.settled(load([*BASE, "micro_batch=2"])).dtype == "float32"


def test_auto_trains_and_the_first_line_says_in_what(tmp_path, capfd):
    def run() -> int:
        return train.train(load([*BASE, "micro_batch=8", "steps=1", "dtype=auto", f"run_dir={tmp_path}"]))

    run_ranks(run, 1)
    dtype = "bfloat16" if device.multiplies_bfloat16() else "float32"
    assert f"on 1 x cpu in {dtype}, " in capfd.readouterr().out.splitlines()[0]
    assert f"dtype: {dtype}\n" in next(tmp_path.glob("*/config.yaml")).read_text()


def test_auto_does_not_compile():
    with pytest.raises(ConfigError, match="compile=true with dtype=auto, which may choose float32"):
        load([*BASE, "micro_batch=2", "dtype=auto", "compile=true"])
