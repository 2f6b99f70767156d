"""Is it the published AFMoE, and does each of its parts do what its equation says?

Expected values come from `transformers`' AfmoeForCausalLM, from slow loops written from the report's
equations (arXiv:2602.17004), or from an invariance. All in float32; tolerances are stated where they are
used.

Letters: B sequences, L tokens each, T = B L, D model dim, F expert hidden dim, E experts, K per token, V
vocabulary.
"""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from transformers import AfmoeConfig, AfmoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from tests.models import GQA, LENGTH, assert_close, build, one_moe, tokens_of
from trainer.balance import LossWeights
from trainer.config import CONFIG_DIR, ModelConfig
from trainer.model import loss as loss_module
from trainer.model.afmoe import PADDING, Afmoe, afmoe_config, moe_layers
from trainer.model.hf import hf_config, to_hf
from trainer.model.loss import IGNORE, linear_cross_entropy
from trainer.model.moe import MoE
from trainer.model.recompute import CHECKPOINTING
from trainer.size import count_parameters, flops_per_token

SHAPES = {
    "gqa": GQA,
    "mha, no dense layer": replace(GQA, num_dense_layers=0, num_layers=4, num_kv_heads=4, head_dim=8),
    "no shared expert": replace(GQA, num_shared_experts=0, num_layers=2, global_every=2),
    "one kv head, two shared experts": replace(
        GQA, num_kv_heads=1, num_shared_experts=2, num_layers=3, global_every=3
    ),
    "all experts chosen, another rope": replace(GQA, top_k=8, num_layers=3, rope_theta=100.0, norm_eps=1e-3),
    "all layers dense, window beyond the row": replace(
        GQA, num_dense_layers=2, num_layers=2, global_every=2, window=99
    ),
}


def gradients(model: Afmoe, *args: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(*args).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def row(*lengths: int) -> list[int]:
    """Positions of documents of these lengths; a negative length is padding."""
    return [p for n in lengths for p in (range(n) if n > 0 else [PADDING] * -n)]


# -- against transformers -------------------------------------------------------------------------------


def oracle(shape: ModelConfig, model: Afmoe, directory) -> AfmoeForCausalLM:
    """transformers' own model, read from a directory as users read it; slow attention and expert loops."""
    save_file(to_hf(model.state_dict(), shape), directory / "model.safetensors")
    AfmoeConfig(**hf_config(shape, max_position_embeddings=LENGTH)).save_pretrained(directory)
    slow = {"attn_implementation": "eager", "experts_implementation": "eager"}
    hf, info = AfmoeForCausalLM.from_pretrained(directory, output_loading_info=True, **slow)
    empty = {name for name, p in hf.named_parameters() if p.numel() == 0}  # without shared experts
    assert info["missing_keys"] == empty and not info["unexpected_keys"] and not info["mismatched_keys"]
    return hf


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_logits_and_gradients_of_transformers(shape, tmp_path):
    """Logits (of size 2) within 1e-5; the gradient of every tensor on disk, each expert's too, within
    1e-5.
    """
    model = build(shape)
    hf = oracle(shape, model, tmp_path)
    tokens_BL, labels_BL = tokens_of(shape, 2, LENGTH), tokens_of(shape, 2, LENGTH, seed=3)
    labels_BL[0, :5] = IGNORE
    logits_BLV = hf(tokens_BL).logits
    assert 1 < logits_BLV.abs().max() < 10
    torch.testing.assert_close(model(tokens_BL), logits_BLV, rtol=0, atol=1e-5)

    F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL.flatten(), reduction="sum").backward()
    theirs = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters() if p.numel()
    }
    ours = model.state_dict() | gradients(model, tokens_BL, None, labels_BL)
    # never a gradient
    ours |= {n: torch.zeros_like(t) for n, t in ours.items() if n.endswith("expert_bias_E")}
    assert_close(to_hf(ours, shape), revert_weight_conversion(hf, theirs), relative=1e-5)


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_parameter_counts_of_transformers(name):
    """Exact. transformers holds the routing biases as parameters, we hold them as buffers: taken off its
    count.
    """
    shape = ModelConfig(**OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml"))
    with torch.device("meta"):
        hf = AfmoeForCausalLM(AfmoeConfig(**hf_config(shape, max_position_embeddings=4096)))
    sizes = {n: p.numel() for n, p in hf.named_parameters()}
    biases = sum(size for n, size in sizes.items() if n.endswith("expert_bias"))
    experts = sum(size for n, size in sizes.items() if ".experts." in n)
    assert biases == shape.num_experts * (shape.num_layers - shape.num_dense_layers)
    count = count_parameters(shape)
    assert count.total == sum(sizes.values()) - biases
    assert (
        count.active * shape.num_experts
        == (count.total - experts) * shape.num_experts + experts * shape.top_k
    )


SHAPES = {path.stem: OmegaConf.load(path) for path in (CONFIG_DIR / "model").glob("*.yaml")}
ODD = replace(GQA, num_layers=5, num_dense_layers=2, num_shared_experts=0, vocab_size=101, head_dim=6)


@pytest.mark.parametrize(
    "shape",
    [*(ModelConfig(**SHAPES[name]) for name in sorted(SHAPES)), ODD, replace(ODD, num_dense_layers=5)],
)
def test_parameters_are_those_of_the_model_that_is_built(shape):
    with torch.device("meta"):
        model = afmoe_config(shape, flex=False).build()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".inner_experts." in name)
    count = count_parameters(shape)
    assert count.total == sum(sizes.values())
    assert (count.total - count.active) * shape.num_experts == experts * (shape.num_experts - shape.top_k)


@pytest.mark.parametrize(("seq_len", "window"), [(17, 6), (17, 17), (4, 6), (1, 6)])
def test_flops_per_token_of_a_slow_loop(seq_len, window):
    """Matmuls: 2 FLOP per weight forward, 4 backward. Attention: q k and scores v, 4 N H forward, 8 N H
    backward.
    """
    shape = replace(GQA, window=window, num_layers=9)
    flops = 0
    for position in range(seq_len):
        for layer in range(shape.num_layers):
            is_global = layer in (3, 7)
            attended = position + 1 if is_global else min(position + 1, window)
            heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            ffn = shape.ffn_dim if layer == 0 else shape.expert_dim * (shape.top_k + shape.num_shared_experts)
            router = 0 if layer == 0 else shape.num_experts
            flops += 12 * heads * attended + 6 * shape.dim * (3 * heads + 2 * kv + 3 * ffn + router)
            flops += 6 * (4 * shape.dim + 2 * shape.head_dim)  # norm gains, counted as if they were matmuls
        flops += 6 * shape.dim * shape.vocab_size + 6 * shape.dim
    assert flops_per_token(shape, seq_len=seq_len) == pytest.approx(flops / seq_len, rel=1e-12)


# -- rows: documents, windows, padding ------------------------------------------------------------------


ROWS = {
    "one row": [row(5, 1, 1, 9, 8)],
    "rows": [row(24), row(1, 23), row(7, 1, 1, 1, 14), row(*[1] * 24)],
    "padding": [row(20, -4), row(3, 1, -20), row(1, -3, 8, -2, 10), row(23, -1)],
    "one row of padding": [row(-24)],
    "padding first, padding only": [row(-2, 10, -12), row(-24)],
}


def whole(mask):
    """(B, queries, keys) of the blocks of a mask; what is in none is hidden."""
    ends = [(block.queries.stop, block.keys.stop) for block in mask.blocks]
    pairs = torch.zeros(mask.num_rows, *map(max, zip(*ends, strict=True)), dtype=torch.bool)
    for number, block in enumerate(mask.blocks):
        pairs[:, block.queries, block.keys] = mask.mask(number, torch.float32)[:, 0] == 0
    return pairs


@pytest.mark.parametrize("positions", ROWS.values(), ids=ROWS.keys())
def test_masks_of_a_slow_loop(positions):
    """A token sees s <= t of its own document, a local layer only max(1, t - w + 1) <= s (eq. 8)."""
    inputs = build(GQA).attention_inputs(torch.tensor(positions))
    global_mask, local_mask = whole(inputs.global_mask), whole(inputs.local_mask)
    for b, position_L in enumerate(positions):
        document_L = [sum(p == 0 for p in position_L[: t + 1]) for t in range(LENGTH)]
        for t in range(LENGTH):
            # may see what it likes, but something: a softmax over nothing is not a number
            if position_L[t] == PADDING:
                assert global_mask[b, t].any() and local_mask[b, t].any()
                continue
            for s in range(LENGTH):
                seen = s <= t and document_L[s] == document_L[t]
                assert bool(global_mask[b, t, s]) == seen
                assert bool(local_mask[b, t, s]) == (seen and max(0, t - GQA.window + 1) <= s)


@pytest.mark.parametrize(
    "lengths", [[(1, 7, 1, 1, 10, 4)], [(24,), (1, 1, 22), (23, 1), (2, 12, 10)]], ids=["one row", "rows"]
)
def test_packed_documents_are_alone(lengths):
    """Logits of a document do not depend on its neighbours (1e-5), nor do the gradients (1e-5 relative)."""
    model = build(GQA)
    tokens_BL, labels_BL = tokens_of(GQA, len(lengths), LENGTH), tokens_of(GQA, len(lengths), LENGTH, seed=3)
    positions_BL = torch.tensor([row(*ns) for ns in lengths])
    logits_BLV = model(tokens_BL, positions_BL)
    packed, alone = gradients(model, tokens_BL, positions_BL, labels_BL), None
    for b, ns in enumerate(lengths):
        start = 0
        for n in ns:
            document = slice(start, start + n)
            single = tokens_BL[b : b + 1, document]
            torch.testing.assert_close(logits_BLV[b : b + 1, document], model(single), rtol=0, atol=1e-5)
            part = gradients(model, single, None, labels_BL[b : b + 1, document])
            alone = part if alone is None else {name: g + part[name] for name, g in alone.items()}
            start += n
    assert_close(packed, alone, relative=1e-5)


@pytest.mark.parametrize("num_real", [(17, 9), (24, 0)], ids=["padded rows", "a row of padding"])
def test_padding_is_nothing(num_real):
    """Logits, gradients (with the sequence balance loss on) and counts are those of the rows without
    padding.
    """
    model = build(GQA, loss_weights=LossWeights(sequence=0.1))
    tokens_BL, labels_BL = tokens_of(GQA, 2, LENGTH), tokens_of(GQA, 2, LENGTH, seed=3)
    positions_BL = torch.tensor([row(n, n - LENGTH) for n in num_real])
    labels_BL[positions_BL == PADDING] = IGNORE
    padded, counts = gradients(model, tokens_BL, positions_BL, labels_BL), taken_counts(model)
    assert counts.sum() == 4 * sum(num_real) * GQA.top_k

    alone, alone_counts = {name: torch.zeros_like(g) for name, g in padded.items()}, torch.zeros_like(counts)
    for b, n in enumerate(num_real):
        if n:
            single = (tokens_BL[b : b + 1, :n], None, labels_BL[b : b + 1, :n])
            torch.testing.assert_close(
                model(tokens_BL, positions_BL)[b : b + 1, :n], model(single[0]), rtol=0, atol=1e-5
            )
            alone = {name: g + alone[name] for name, g in gradients(model, *single).items()}
            alone_counts += taken_counts(model)
    assert torch.equal(counts, alone_counts)
    assert_close(padded, alone, relative=1e-5)


def taken_counts(model: Afmoe) -> Tensor:
    """What the Balancer does: read (M, E) and reset."""
    counts_ME = torch.stack([layer.tokens_per_expert_E.clone() for layer in moe_layers(model)])
    for layer in moe_layers(model):
        layer.tokens_per_expert_E.zero_()
    return counts_ME


# -- one MoE layer --------------------------------------------------------------------------------------


def slow_moe(
    moe: MoE, weights: dict[str, Tensor], x_BLD: Tensor, valid_BL: Tensor, *, shape: ModelConfig, alpha: float
):
    """eq. 15-18 token by token and expert by expert, and alpha times eq. 29-32 times the tokens of each
    sequence.
    """

    def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        return w2 @ (F.silu(w1 @ x) * (w3 @ x))

    bias = moe.expert_bias_E.double()
    routed = [weights[f"routed_experts.inner_experts.{n}"] for n in ("w1_EFD", "w2_EDF", "w3_EFD")]
    shared = [weights[f"shared_experts.{n}.weight"] for n in ("w1", "w2", "w3")]
    out_BLD, balance, counts = [], 0.0, [0] * shape.num_experts
    for x_LD, valid_L in zip(x_BLD, valid_BL.tolist(), strict=True):
        f, P = [0.0] * shape.num_experts, 0.0
        for x, valid in zip(x_LD, valid_L, strict=True):
            s = torch.sigmoid(weights["router.gate.weight"] @ x)
            score = (s + bias).tolist()
            chosen = sorted(range(shape.num_experts), key=lambda e: -score[e])[: shape.top_k]
            total = sum(s[e] for e in chosen)
            gated = [s[e] / total * shape.route_scale * swiglu(x, *(w[e] for w in routed)) for e in chosen]
            out_BLD.append(sum(gated) + swiglu(x, *shared))
            if valid:
                P = P + s / s.sum() / sum(valid_L)
                for e in chosen:
                    f[e] += shape.num_experts / (shape.top_k * sum(valid_L))
                    counts[e] += 1
        balance = balance + sum(valid_L) * (torch.tensor(f).double() * P).sum()
    return torch.stack(out_BLD).view_as(x_BLD), alpha * balance, counts


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_moe_layer_of_a_slow_loop(alpha, padded):
    """Output, counts and all gradients against float64: 3e-6 relative."""
    moe = one_moe(GQA, loss_weights=LossWeights(sequence=alpha))
    x_BLD = torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(4), requires_grad=True)
    grad_BLD = torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(5))
    valid_BL = (
        torch.arange(10).expand(2, 10) < torch.tensor([[10], [6]])
        if padded
        else torch.ones(2, 10, dtype=torch.bool)
    )
    weights = {n: p.detach().double().requires_grad_() for n, p in moe.named_parameters()}
    slow_x_BLD = x_BLD.detach().double().requires_grad_()
    expected_BLD, balance, counts = slow_moe(moe, weights, slow_x_BLD, valid_BL, shape=GQA, alpha=alpha)
    ((expected_BLD * grad_BLD).sum() + balance).backward()

    out_BLD = moe(x_BLD, valid_BL if padded else None)
    out_BLD.backward(grad_BLD)
    actual = {"out": out_BLD, "x": x_BLD.grad} | {n: p.grad for n, p in moe.named_parameters()}
    expected = {"out": expected_BLD, "x": slow_x_BLD.grad} | {n: w.grad for n, w in weights.items()}
    assert_close(actual, expected, relative=3e-6)
    assert moe.tokens_per_expert_E.tolist() == counts


def test_experts_without_tokens():
    """A bias of -9 beats any score: those experts get no token, and a gradient that is zero, not None."""
    moe = one_moe(GQA)
    moe.expert_bias_E[[0, 3, 7]] = -9.0
    out_BLD = moe(torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(4)))
    out_BLD.square().sum().backward()
    assert out_BLD.isfinite().all() and (moe.tokens_per_expert_E == 0).nonzero().flatten().tolist() == [
        0,
        3,
        7,
    ]
    for weight in moe.routed_experts.inner_experts.parameters():
        assert weight.grad.isfinite().all()
        assert (weight.grad.flatten(1).norm(dim=1) == 0).nonzero().flatten().tolist() == [0, 3, 7]


def test_bfloat16_experts():
    """Only the experts' matmuls are rounded: output and gradients within 2 % (bfloat16 rounds by up to 0.4
    %).
    """
    x_BLD = torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(4))
    results = {}
    for dtype in ("float32", "bfloat16"):
        moe = one_moe(replace(GQA, expert_dtype=dtype))
        out_BLD = moe(x_BLD)
        out_BLD.square().sum().backward()
        results[dtype] = {"out": out_BLD} | {n: p.grad for n, p in moe.named_parameters()}
        assert {t.dtype for t in results[dtype].values()} == {torch.float32}
    assert_close(results["bfloat16"], results["float32"], relative=2e-2)
    assert not torch.equal(results["bfloat16"]["out"], results["float32"]["out"])


def test_router_is_float32_under_bfloat16_weights():
    """Scores are those of float32 arithmetic on the bfloat16 values: bit for bit."""
    moe = one_moe(GQA)
    for parameter in moe.parameters():
        parameter.data = parameter.data.bfloat16()
    x_BLD = torch.randn(2, 10, GQA.dim, generator=torch.Generator().manual_seed(4)).bfloat16()
    gates_BLK, _, scores_BLE, _ = moe.router(x_BLD, moe.expert_bias_E)
    assert scores_BLE.dtype == gates_BLK.dtype == moe.expert_bias_E.dtype == torch.float32
    assert torch.equal(scores_BLE, torch.sigmoid(F.linear(x_BLD.float(), moe.router.gate.weight.float())))
    assert moe(x_BLD).dtype == torch.bfloat16


# -- what counts as training ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(kind):
    """Loss, gradients and counts, bit for bit; two microbatches count twice, the repeated forward does
    not.
    """
    tokens_BL, labels_BL = tokens_of(GQA, 2, LENGTH), tokens_of(GQA, 2, LENGTH, seed=3)
    positions_BL = torch.tensor([row(20, -4), row(3, 1, 20)])
    results = []
    for wrap in (False, True):
        model = build(GQA, loss_weights=LossWeights(sequence=0.1))
        if wrap:
            CHECKPOINTING[kind].build().apply(model)
        loss = model(tokens_BL, positions_BL, labels_BL)
        loss.backward()
        once = taken_counts(model)
        for _ in range(2):
            model(tokens_BL, positions_BL, labels_BL).backward()
        results.append((loss, [p.grad for p in model.parameters()], once))
        assert torch.equal(taken_counts(model), 2 * once)
    (loss, grads, counts), (loss_ac, grads_ac, counts_ac) = results
    assert torch.equal(loss, loss_ac) and torch.equal(counts, counts_ac)
    assert counts.sum(1).tolist() == [44 * GQA.top_k] * 4
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_ac, strict=True))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "eval and backward"])
def test_evaluation_leaves_no_trace(mode):
    model = build(GQA, loss_weights=LossWeights(sequence=0.1))
    model.train(mode == "no_grad")
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tokens_BL = tokens_of(GQA, 2, LENGTH)
    if mode == "no_grad":
        with torch.no_grad():
            model(tokens_BL, None, tokens_BL)
    else:
        loss = model(tokens_BL, None, tokens_BL)
        if mode == "eval and backward":
            loss.backward()
    assert any("routing_sums_S" in name for name in before)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


# -- the loss -------------------------------------------------------------------------------------------


def slow_cross_entropy(
    x_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, *, z_loss_weight: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy, and what is minimized: cross entropy + weight * logsumexp^2, summed over labelled
    tokens.
    """
    logits_TV = x_TD @ weight_VD.T
    value = F.cross_entropy(logits_TV, labels_T, ignore_index=IGNORE, reduction="sum")
    return value, value + z_loss_weight * logits_TV.logsumexp(1)[labels_T != IGNORE].square().sum()


@functools.cache
def loss_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """29 tokens of 16 numbers, 50 words; label 0 and an ignored label among them."""
    generator = torch.Generator().manual_seed(6)
    x_TD, weight_VD = torch.randn(29, 16, generator=generator), torch.randn(50, 16, generator=generator)
    labels_T = torch.randint(50, (29,), generator=generator)
    labels_T[[3, 4, 28]], labels_T[[5, 27]] = IGNORE, 0
    return x_TD, weight_VD, labels_T


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 7, 29, 1000])
def test_linear_cross_entropy(chunk_tokens, z_loss_weight, monkeypatch):
    """Value and gradients (of three times the loss) against torch, 1e-5 relative; chunks larger than all
    tokens too.
    """
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 50 * chunk_tokens)
    x_TD, weight_VD, labels_T = loss_inputs()
    x_TD, weight_VD = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    value, minimized = slow_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=z_loss_weight)
    expected = torch.autograd.grad(3 * minimized, (x_TD, weight_VD))
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=z_loss_weight)
    actual = torch.autograd.grad(3 * loss, (x_TD, weight_VD))
    torch.testing.assert_close(loss, value, rtol=1e-5, atol=0)
    assert_close(dict(zip("xw", actual, strict=True)), dict(zip("xw", expected, strict=True)), relative=1e-5)
    assert (actual[0][labels_T == IGNORE] == 0).all()
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=z_loss_weight), loss)


def test_an_evaluation_multiplies_once_where_training_multiplies_thrice(monkeypatch):
    """Two products with the vocabulary are the gradients', and nobody asks for them under no_grad."""
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 50 * 10)  # 3 chunks
    x_TD, weight_VD, labels_T = loss_inputs()
    x_TD, weight_VD = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()

    def products() -> int:
        with torch.profiler.profile() as profile:
            linear_cross_entropy(x_TD, weight_VD, labels_T)
        return sum(e.count for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm_"))

    assert products() == 3 * 3
    with torch.no_grad():
        assert products() == 3


def test_linear_cross_entropy_without_labels():
    x_TD, weight_VD, labels_T = loss_inputs()
    x_TD, weight_VD = x_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss = linear_cross_entropy(x_TD, weight_VD, torch.full_like(labels_T, IGNORE), z_loss_weight=0.01)
    loss.backward()
    assert loss == 0 and (x_TD.grad == 0).all() and (weight_VD.grad == 0).all()


def test_linear_cross_entropy_in_bfloat16():
    """Logits and their gradient are rounded to bfloat16, sums are float32: 1 % of float32 on the same
    values.
    """
    x_TD, weight_VD, labels_T = loss_inputs()
    x_TD, weight_VD = x_TD.bfloat16().requires_grad_(), weight_VD.bfloat16().requires_grad_()
    exact = [t.detach().float().requires_grad_() for t in (x_TD, weight_VD)]
    value, minimized = slow_cross_entropy(*exact, labels_T, z_loss_weight=0.01)
    loss = linear_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, value, rtol=1e-2, atol=0)
    expected = torch.autograd.grad(minimized, exact)
    actual = (g.float() for g in torch.autograd.grad(loss, (x_TD, weight_VD)))
    assert_close(dict(zip("xw", actual, strict=True)), dict(zip("xw", expected, strict=True)), relative=1e-2)


@pytest.mark.parametrize("z_loss_weight", [0.0, 0.01])
def test_model_loss_is_that_of_its_logits(z_loss_weight):
    """Through the whole model: value and gradients of the explicit formula on the model's own logits, 1e-5
    relative.
    """
    model = build(GQA, z_loss_weight=z_loss_weight)
    tokens_BL, labels_BL = tokens_of(GQA, 2, LENGTH), tokens_of(GQA, 2, LENGTH, seed=3)
    labels_BL[1, 7:11] = IGNORE
    actual = gradients(model, tokens_BL, None, labels_BL)
    model.zero_grad()
    logits_TV, identity_VV = model(tokens_BL).flatten(0, 1), torch.eye(GQA.vocab_size)
    value, minimized = slow_cross_entropy(
        logits_TV, identity_VV, labels_BL.flatten(), z_loss_weight=z_loss_weight
    )
    minimized.backward()
    torch.testing.assert_close(model(tokens_BL, None, labels_BL), value, rtol=1e-5, atol=0)
    assert_close(actual, {n: p.grad for n, p in model.named_parameters()}, relative=1e-5)
