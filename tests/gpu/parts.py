"""Stage 3. Does every other part of the model compute on this device what its equation says?

Oracles: loops and formulas in float64; the CPU for integers and initial weights; and each part against
itself, run again: the same bits, as a resumed run must give.

Letters: T tokens, K experts per token, N = T K, D model dim, E experts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gpu.attention import SHAPE
from tests.gpu.bench import Bench, random, relative, worst
from trainer.balance import routing_sums
from trainer.model.afmoe import afmoe_config
from trainer.model.dispatch import gather_sum, invert
from trainer.model.init import initialize
from trainer.model.loss import IGNORE, linear_cross_entropy
from trainer.model.norm import RMSNorm
from trainer.optim.newton_schulz import QUINTIC, STEPS, orthogonalize

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Size:
    tokens: int
    dim: int
    vocabulary: int
    side: int  # of a matrix to be orthogonalised


SIZES = {
    "cuda": Size(tokens=4096, dim=1024, vocabulary=200_192, side=1024),
    "cpu": Size(tokens=96, dim=32, vocabulary=640, side=32),
}
TOP_K, NUM_EXPERTS = 4, 16


def twice(bench: Bench, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """The result, held to that of a second call bit for bit."""
    first = compute()
    bench.same(f"{name}, twice", compute(), first)
    return first


def gathered_sums(bench: Bench, size: Size) -> None:
    """out_T = sum over k of weights_Tk rows[index_Tk], in one and in the other form: float32 1e-6."""
    rows = random(size.tokens * TOP_K, size.dim, seed=0, on=bench.on)
    index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).view(size.tokens, TOP_K)
    weights = random(size.tokens, TOP_K, seed=2, on=CPU)
    picked_TKD = rows.cpu().double()[index]
    plain = twice(bench, "sum", lambda: gather_sum(rows, index.to(bench.on)))
    weighted = twice(
        bench, "weighted sum", lambda: gather_sum(rows, index.to(bench.on), weights.to(bench.on))
    )
    bench.at_most("sum", relative(plain, picked_TKD.sum(1)), 1e-6)
    expected = (picked_TKD * weights.double().unsqueeze(-1)).sum(1)
    bench.at_most("weighted sum", relative(weighted, expected), 1e-6)


def experts_and_back(bench: Bench, size: Size) -> None:
    """Tokens to experts and back through the layer's own dispatcher: gradients of a loop over tokens, 1e-6.

    Expert e multiplies by e + 1.
    """
    ids = torch.randint(NUM_EXPERTS, (size.tokens, TOP_K), generator=torch.Generator().manual_seed(3))
    x, scores = (
        random(size.tokens, size.dim, seed=4, on=CPU),
        random(size.tokens, TOP_K, seed=5, on=CPU).sigmoid(),
    )
    grad = random(size.tokens, size.dim, seed=6, on=CPU)
    slow_x, slow_scores = x.double().requires_grad_(), scores.double().requires_grad_()
    slow = sum(slow_x * (ids[:, k : k + 1] + 1) * slow_scores[:, k : k + 1] for k in range(TOP_K))
    slow.backward(grad.double())
    model = SHAPE_WITH_EXPERTS
    dispatcher = model.layers[0].moe.routed_experts.token_dispatcher.build()

    def run() -> dict[str, Tensor]:
        own_x, own_scores = (t.to(bench.on, copy=True).requires_grad_() for t in (x, scores))
        counts = torch.bincount(ids.flatten(), minlength=NUM_EXPERTS).to(bench.on)
        rows, per_expert, metadata = dispatcher.dispatch(own_x, own_scores, ids.to(bench.on), counts)
        factor = torch.arange(1, NUM_EXPERTS + 1, device=bench.on).repeat_interleave(per_expert)
        out = dispatcher.combine(rows * factor.unsqueeze(1), metadata, own_x)
        out.backward(grad.to(bench.on))
        return {"out": out.detach(), "x": own_x.grad, "scores": own_scores.grad}

    first, second = run(), run()
    bench.at_most("worst", worst(first, {"out": slow, "x": slow_x.grad, "scores": slow_scores.grad}), 1e-6)
    bench.same("twice", all(torch.equal(first[name], second[name]) for name in first), True)


SHAPE_WITH_EXPERTS = afmoe_config(
    type(SHAPE)(**{**vars(SHAPE), "num_dense_layers": 0, "num_experts": NUM_EXPERTS, "top_k": TOP_K}),
    flex=False,
)


def counts(bench: Bench, size: Size) -> None:
    """Integers of the routing are those of the CPU: scores are multiples of 1/64, so no sum is rounded."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randint(-128, 129, (2, size.tokens, NUM_EXPERTS), generator=generator) / 64
    scores, bias = torch.sigmoid(logits), torch.zeros(NUM_EXPERTS)
    ids = (scores + bias).topk(TOP_K, dim=-1).indices
    valid = torch.ones(2, size.tokens, dtype=torch.bool)
    valid[1, size.tokens // 2 :] = False
    inputs = (scores, logits, ids, bias, valid)
    of_cpu = routing_sums(*inputs, required=True)
    on_device = twice(bench, "sums", lambda: routing_sums(*(t.to(bench.on) for t in inputs), required=True))
    bench.same("sums", on_device.cpu(), of_cpu)
    permutation = torch.randperm(size.tokens, generator=generator)
    bench.same("inverse", invert(permutation.to(bench.on)).cpu(), permutation.argsort())


def loss(bench: Bench, size: Size) -> None:
    """Cross entropy over the whole vocabulary against float64: float32 1e-6, 1e-5; bfloat16 1e-3, 2e-2."""
    labels = torch.randint(size.vocabulary, (size.tokens // 4,), generator=torch.Generator().manual_seed(8))
    labels[:5] = IGNORE
    labels = labels.to(bench.on)
    x = random(len(labels), size.dim, seed=9, on=bench.on).bfloat16()
    head = (random(size.vocabulary, size.dim, seed=10, on=bench.on) / size.dim**0.5).bfloat16()
    exact_x, exact_head = x.double().requires_grad_(), head.double().requires_grad_()
    exact = F.cross_entropy(exact_x @ exact_head.T, labels, reduction="sum", ignore_index=IGNORE)
    exact.backward()
    expected = {"x": exact_x.grad.cpu(), "head": exact_head.grad.cpu()}
    del exact_x, exact_head
    for dtype, value, gradients in ((torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-3, 2e-2)):
        of = str(dtype).removeprefix("torch.")
        own_x, own_head = (t.to(dtype).requires_grad_() for t in (x, head))
        ours = linear_cross_entropy(own_x, own_head, labels)
        ours.backward()
        bench.at_most(f"{of}: loss", relative(ours, exact), value)
        error = worst({"x": own_x.grad, "head": own_head.grad}, expected)
        bench.at_most(f"{of}: gradients", error, gradients)
        again = linear_cross_entropy(own_x, own_head, labels)
        bench.same(f"{of}: loss, twice", again.detach(), ours.detach())


def norm(bench: Bench, size: Size) -> None:
    """x / sqrt(mean x^2 + eps) w, output and gradients, against float64: 1e-6, 1e-5; bfloat16 1e-2."""
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = RMSNorm.Config(normalized_shape=size.dim, eps=1e-5).build()
        gain = 1 + 0.3 * random(size.dim, seed=11, on=CPU)
        layer.load_state_dict({"weight": gain})
        layer.to(bench.on, dtype)
        x = random(size.tokens, size.dim, seed=12, on=bench.on, dtype=dtype).requires_grad_()
        grad = random(size.tokens, size.dim, seed=13, on=bench.on, dtype=dtype)
        out = layer(x)
        out.backward(grad)
        slow_x, slow_gain = (t.detach().double().requires_grad_() for t in (x, layer.weight))
        slow = slow_x / (slow_x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * slow_gain
        slow.backward(grad.double())
        of = str(dtype).removeprefix("torch.")
        error = worst(
            {"out": out, "x": x.grad, "gain": layer.weight.grad},
            {"out": slow, "x": slow_x.grad, "gain": slow_gain.grad},
        )
        bench.at_most(of, error, limit)


def orthogonal(bench: Bench, size: Size) -> None:
    """Newton-Schulz is an odd polynomial of each singular value, so an SVD in float64 knows the result.

    float32 1e-4, bfloat16 5e-2 relative: small singular values are stretched up to 480 times, and so are
    their errors.
    """
    batch = torch.stack([random(size.side // 2, size.side, seed=seed, on=bench.on) for seed in (14, 15)])
    left, values, right = torch.linalg.svd(batch.double().cpu(), full_matrices=False)
    values = values / values.square().sum(-1, keepdim=True).sqrt()
    a, b, c = QUINTIC
    for _ in range(STEPS):
        values = a * values + b * values**3 + c * values**5
    expected = left @ torch.diag_embed(values) @ right
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        of = str(dtype).removeprefix("torch.")
        result = twice(bench, of, lambda dtype=dtype: orthogonalize(batch.to(dtype)))
        bench.at_most(of, relative(result, expected), limit)


def initial_weights(bench: Bench, size: Size) -> None:
    """Bit for bit those of the CPU."""
    models = []
    for on in (CPU, bench.on):
        with torch.device("meta"):
            models.append(SHAPE_WITH_EXPERTS.build())
        initialize(models[-1], device=on, seed=0)
    of_cpu, of_device = (model.state_dict() for model in models)
    equal = [torch.equal(of_device[name].cpu(), tensor) for name, tensor in of_cpu.items()]
    bench.same("tensors that are equal", sum(equal), len(of_cpu))


CHECKS = (gathered_sums, experts_and_back, counts, loss, norm, orthogonal, initial_weights)
