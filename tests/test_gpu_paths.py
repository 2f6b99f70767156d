"""Does what runs on a GPU only do what it should, as far as a CPU can tell?

What a function does on tensors that are not on a CPU is run here on the meta device, where operators have
shapes and no values, or its parts are called with CPU tensors. Expected values are those of the CPU's path,
of float64, or worked out by hand.
"""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torchtitan.models.common.attention import get_sliding_window_mask_mod

from tests.models import GQA
from tests.traffic import Traffic
from trainer.config import MXFP8, ConfigError, load
from trainer.model import compiled, dispatch, hardware
from trainer.model import loss as loss_module
from trainer.model.afmoe import afmoe_config
from trainer.model.attention import FlexAttention
from trainer.model.init import initialize
from trainer.model.loss import chunk_tokens, linear_cross_entropy
from trainer.model.moe import _ClearIdle
from trainer.model.recompute import CHECKPOINTING, GROUPED_GEMMS
from trainer.ranks import device
from trainer.ranks.device import Hardware

META = torch.device("meta")
LARGE_VOCAB, LARGE_DIM, ROW = 200_192, 3072, 8192  # Trinity Large, one row of its first stage

# -- the loss ---------------------------------------------------------------------------------------------


def test_head_and_loss_of_a_row_of_large_move_a_quarter_terabyte_at_most():
    """By hand: a chunk reads the head's 1.23 GB twice, writes its gradient's 1.23 GB in bfloat16, reads that
    again, and reads and writes 2.46 GB of float32: 9.8 GB, 8 times. Each logit costs 58 bytes: 95 GB.
    """
    x_TD = torch.empty(ROW, LARGE_DIM, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight_VD = torch.empty(LARGE_VOCAB, LARGE_DIM, dtype=torch.bfloat16, device=META, requires_grad=True)
    labels_T = torch.empty(ROW, dtype=torch.int64, device=META)
    with Traffic() as traffic:
        linear_cross_entropy(x_TD, weight_VD, labels_T, z_loss_weight=1e-4).backward()
    assert 0.15e12 < traffic.bytes < 0.25e12
    assert traffic.largest <= 4 * LARGE_VOCAB * LARGE_DIM  # nothing is larger than the head's gradient


def test_chunks_by_device():
    """A CPU's are 2^22 logits, as ever; a GPU's are 1,024 tokens or a multiple, of at most 2^28 logits."""
    cpu = {vocab: chunk_tokens(vocab, on=torch.device("cpu")) for vocab in (1024, 50_000, LARGE_VOCAB, 2**24)}
    assert cpu == {1024: 4096, 50_000: 83, LARGE_VOCAB: 20, 2**24: 1}
    gpu = {
        vocab: chunk_tokens(vocab, on=torch.device("cuda")) for vocab in (1024, 50_000, LARGE_VOCAB, 2**24)
    }
    assert gpu == {1024: 2**18, 50_000: 5 * 1024, LARGE_VOCAB: 1024, 2**24: 1024}


def test_sums_by_group_are_those_of_the_cpu_and_keep_what_is_not_finite_apart():
    """Against index_add_, 1e-12 relative; a group without tokens, and one with a loss that is infinite."""
    generator = torch.Generator().manual_seed(0)
    both_2t = torch.randn(2, 500, generator=generator, dtype=torch.float64)
    group_t = torch.randint(0, 4, (500,), generator=generator)
    expected_2G = torch.zeros(2, 6, dtype=torch.float64).index_add_(1, group_t, both_2t)
    actual_2G = loss_module.sums_by_group(both_2t, group_t, num_groups=6)
    torch.testing.assert_close(actual_2G, expected_2G, rtol=1e-12, atol=1e-12)
    both_2t[0, (group_t == 2).nonzero()[0]] = torch.inf
    assert loss_module.sums_by_group(both_2t, group_t, num_groups=6)[0].isinf().tolist() == [
        group == 2 for group in range(6)
    ]


# -- experts and the ways to them -------------------------------------------------------------------------


def routing(*, num_tokens: int, top_k: int, num_experts: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Experts of each token, the order that sorts their slots, and its inverse."""
    scores_TE = torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    ids_TK = scores_TE.topk(top_k, dim=1).indices
    order_N = torch.argsort(ids_TK.flatten(), stable=True)
    return ids_TK, order_N, dispatch.invert(order_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_experts_and_their_gradients_are_those_of_the_cpu(dtype):
    """The sum with weights and without; gradients of rows and scores: float32 1e-6 relative, bfloat16 one
    rounding."""
    _, order_N, inverse_N = routing(num_tokens=40, top_k=3, num_experts=8)
    generator = torch.Generator().manual_seed(1)
    rows_ND, grad_TD = (torch.randn(n, 16, generator=generator).to(dtype) for n in (120, 40))
    scores_TK, index_TK = torch.rand(40, 3, generator=generator), inverse_N.view(40, 3)
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    for weights_TK in (None, scores_TK):
        torch.testing.assert_close(
            dispatch.gather_sum_in_order(rows_ND, index_TK, weights_TK),
            dispatch.gather_sum(rows_ND, index_TK, weights_TK),
            **near,
        )
    actual = dispatch.spread_gradient(rows_ND, grad_TD, scores_TK, order_N)
    expected = dispatch._spread_gradient_cpu(rows_ND, grad_TD, scores_TK, order_N)
    torch.testing.assert_close(actual[0], expected[0], **near)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_sum_over_experts_needs_no_memory_for_each_of_them():
    """Large: 8,192 tokens, 4 experts each. Nothing is larger than the float32 sum itself, and no bmm."""
    rows_ND = torch.empty(4 * ROW, LARGE_DIM, dtype=torch.bfloat16, device=META)
    index_TK = torch.empty(ROW, 4, dtype=torch.int64, device=META)
    with Traffic() as traffic:
        out_TD = dispatch.gather_sum(rows_ND, index_TK, torch.empty(ROW, 4, device=META))
    assert traffic.largest == 4 * ROW * LARGE_DIM and out_TD.dtype == torch.bfloat16


def test_a_permutation_is_a_gather_in_both_directions():
    """The value and the gradient of indexing, without its index_put."""
    rows_RD = torch.randn(9, 4, requires_grad=True)
    index_R, grad_RD = torch.randperm(9), torch.randn(9, 4)
    with Traffic() as traffic:
        out_RD = dispatch._Permute.apply(rows_RD, index_R)
        (actual,) = torch.autograd.grad(out_RD, rows_RD, grad_RD)
    assert torch.equal(out_RD, rows_RD[index_R])
    assert torch.equal(actual, torch.autograd.grad(rows_RD[index_R], rows_RD, grad_RD)[0])
    assert not any("index_put" in name for name in traffic.names) and traffic.names


def test_idle_experts_get_no_gradient_whatever_memory_held():
    """Experts 1 and 3 have no token; their gradient arrives as NaN, as from memory that was never written."""
    weights_EXY = torch.randn(4, 3, 2, requires_grad=True)
    arriving_EXY = torch.randn(4, 3, 2)
    arriving_EXY[[1, 3]] = torch.nan
    out_EXY = _ClearIdle.apply(weights_EXY, torch.tensor([5, 0, 2, 0]))
    (grad_EXY,) = torch.autograd.grad(out_EXY, weights_EXY, arriving_EXY)
    assert torch.equal(out_EXY, weights_EXY) and (grad_EXY[[1, 3]] == 0).all()
    assert torch.equal(grad_EXY[[0, 2]], arriving_EXY[[0, 2]])


def test_padding_changes_no_result(monkeypatch):
    """MXFP8's way with a stand-in for torchao that multiplies in bfloat16 and checks what it is handed: rows
    of every expert in multiples of 128. Output and gradients are bit for bit those without padding."""
    seen = []

    def scaled_mm(A: Tensor, B_t: Tensor, *, config: object, offs: Tensor) -> Tensor:
        seen.append(offs.tolist())
        assert all(end % multiple == 0 for end in seen[-1]) and len(A) >= seen[-1][-1]
        return torch._grouped_mm(A, B_t, offs=offs)

    stand_in(monkeypatch, scaled_mm)
    results = []
    for multiple in (hardware.MXFP8_ROWS, 1):
        config = afmoe_config(
            replace(GQA, expert_dtype=MXFP8), flex=False, dispatch=dispatch.Dispatch(multiple=multiple)
        )
        with torch.device("meta"):
            model = config.build()
        initialize(model, device=torch.device("cpu"), seed=0)
        tokens_BL = torch.arange(40).view(2, 20) % GQA.vocab_size
        loss = model(tokens_BL, None, tokens_BL)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert len(seen) == 2 * 3 * (GQA.num_layers - GQA.num_dense_layers)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_of_an_expert_are_padded_to_the_next_multiple(monkeypatch):
    """By hand: experts with 1, 0, 129 and 128 rows, numbered from 1; zeros fill up to multiples of 128."""
    rows_RD, sizes_e = torch.arange(1.0, 259.0).view(-1, 1), torch.tensor([1, 0, 129, 128])
    monkeypatch.setattr(dispatch.TokenDispatcher, "dispatch", lambda self: (rows_RD, sizes_e, None))
    padded = dispatch.PaddedTokenDispatcher.Config(num_experts=4, top_k=1, multiple=128).build()
    rows_PD, padded_e, metadata = padded.dispatch()
    assert padded_e.tolist() == [128, 0, 256, 128]
    expected = [1.0] + [0.0] * 127 + [float(n) for n in range(2, 131)] + [0.0] * 127
    expected += [float(n) for n in range(131, 259)]
    assert rows_PD[:512, 0].tolist() == expected and not rows_PD[512:].any()
    assert torch.equal(rows_PD[metadata.place_R], rows_RD)


def stand_in(monkeypatch, scaled_mm) -> None:
    """Modules in torchao's place, with the three names that torchtitan's experts take from them."""
    place = "torchao.prototype.moe_training"
    parts = place.split(".")
    for n in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(".".join(parts[:n])))
    config, utils = ModuleType(f"{place}.config"), ModuleType(f"{place}.utils")
    config.MXFP8TrainingRecipe = lambda name: name
    config.MXFP8TrainingOpConfig = SimpleNamespace(from_recipe=lambda recipe: recipe)
    utils._quantize_then_scaled_grouped_mm = scaled_mm
    monkeypatch.setitem(sys.modules, f"{place}.config", config)
    monkeypatch.setitem(sys.modules, f"{place}.utils", utils)


# -- what is not there ------------------------------------------------------------------------------------

H200, B200 = Hardware("cuda", (9, 0), True), Hardware("cuda", (10, 0), True)
RUN = ["experiment=demo", "model=debug", "dtype=float32"]
BF16, EP2 = "dtype=bfloat16", "parallel.ep=2"
MX, DEEP, HYBRID = "model.expert_dtype=mxfp8", "parallel.dispatcher=deepep", "parallel.dispatcher=hybridep"
REFUSED = [
    (
        [MX, BF16],
        Hardware("cpu"),
        "expert_dtype=mxfp8 needs a GPU .* 10.0 or later, and here is a cpu; use bfloa",
    ),
    ([MX, BF16], H200, "here is compute capability 9.0; use bfloat16"),
    ([MX, BF16], B200, "needs torchao, which is not installed; install it, or use bfloat16"),
    ([DEEP, BF16, EP2], Hardware("cpu"), "dispatcher=deepep needs a GPU .* here is a cpu; use all_to_all"),
    ([DEEP, BF16, EP2], H200, "dispatcher=deepep needs deep_ep, which is not installed; .* use all_to_all"),
    ([HYBRID, BF16, EP2], H200, "dispatcher=hybridep needs a GPU of compute capability 10.0"),
    (
        ["model.head_dim=8"],
        H200,
        "model.head_dim=8: flex attention on a GPU wants at least 16; use model.head_dim=16",
    ),
    (["model.expert_dim=18"], H200, "expert_dim=18 with dtype=float32: .* use model.expert_dim=16 or 20$"),
]
REFUSED_WITH_LIBRARY = [
    ([MX], B200, "expert_dtype=mxfp8 with dtype=float32: .* use dtype=bfloat16"),
    ([MX, BF16, "model.dim=40"], B200, "model.dim=40 with .*mxfp8: .* use model.dim=64"),
    ([MX, BF16, DEEP, EP2], B200, "does not pad .* use parallel.dispatcher=hybridep or all_to_all"),
    ([DEEP, BF16], H200, "deepep with parallel.ep=1: no token changes its rank; use all_to_all"),
    ([DEEP, EP2], H200, "deepep with dtype=float32: it sends bfloat16; use dtype=bfloat16"),
    ([DEEP, BF16, EP2], H200._replace(are_linked=False), "do not reach each other's memory; use all_to_all"),
]


@pytest.mark.parametrize(
    ("overrides", "on", "message", "is_there"),
    [(*case, False) for case in REFUSED] + [(*case, True) for case in REFUSED_WITH_LIBRARY],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_refused_in_one_line(overrides, on, message, is_there):
    with pytest.raises(ConfigError, match=message) as refusal:
        hardware.check_hardware(load([*RUN, *overrides]), on, has_library=lambda name: is_there)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "on"),
    [
        ([], Hardware("cpu")),
        ([BF16], H200),
        ([MX, BF16], B200),
        ([DEEP, BF16, EP2], H200),
        ([HYBRID, MX, BF16, EP2], B200),
    ],
)
def test_what_is_there_is_not_refused(overrides, on):
    hardware.check_hardware(load([*RUN, *overrides]), on, has_library=lambda name: True)


def test_a_dtype_that_is_slow_here_says_so_once(caplog):
    hardware.warn_of_dtype(load(RUN), H200)
    hardware.warn_of_dtype(load(RUN), Hardware("cpu"))
    hardware.warn_of_dtype(load([*RUN, BF16]), H200)
    hardware.warn_of_dtype(load([*RUN, BF16]), Hardware("cpu", has_bfloat16=False))
    said = [record.message.split(":")[0] for record in caplog.records]
    assert said == ["dtype=float32 on a GPU", "dtype=bfloat16"]


def test_matmul_precision_follows_the_dtypes():
    """What is left in float32 beside bfloat16 multiplies bfloat16 values, which TF32 holds: 8 bits of 11."""
    try:
        for dtypes, expected in (
            (("bfloat16", None), "high"),
            (("bfloat16", "mxfp8"), "high"),
            (("bfloat16", "float32"), "highest"),
            (("float32", None), "highest"),
        ):
            device.set_matmul_precision(dtypes=dtypes)
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")


# -- kernels without tuning -------------------------------------------------------------------------------


def test_flex_attention_is_one_fixed_kernel():
    """No option asks for tuning by time, and the family of kernels is set."""
    config = afmoe_config(GQA, flex=True).layers[0].attention.inner_attention
    assert config.kernel_options == {"BACKEND": "TRITON"} and type(config.build()) is FlexAttention
    assert not any(compiled.OPTIONS[key] for key in ("max_autotune", "coordinate_descent_tuning"))
    assert compiled.OPTIONS["deterministic"]


@pytest.mark.parametrize("length", [64, 128, 200])
def test_masks_of_one_block_are_made_without_the_compiler(length, monkeypatch):
    """Inductor cannot generate them; against the mask of all pairs."""
    calls = []
    monkeypatch.setattr(
        compiled, "block_mask", lambda *args, **kwargs: calls.append(1) or create_block_mask(*args, **kwargs)
    )
    window = get_sliding_window_mask_mod(5)
    row = [range(length)]
    mask = FlexAttention.mask(window, 1, row, row, window=5, device=torch.device("cpu"))
    assert bool(calls) == (length > 128)
    blocks = -(-length // 128)
    assert mask.to_dense().shape[-2:] == (blocks, blocks) and mask.seq_lengths == (length, length)


def test_graphs_are_allowed_for_every_shape_of_a_program():
    """By hand: 20 shapes x 4 kinds of blocks x with gradients and without = 160; never fewer than 64."""
    before = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    try:
        compiled.allow_graphs(num_shapes=20)
        assert torch._dynamo.config.recompile_limit == 160
        compiled.allow_graphs(num_shapes=1)
        assert torch._dynamo.config.recompile_limit == 64
    finally:
        torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = before


@pytest.mark.parametrize("kind", ["selective", "selective_experts"])
def test_selective_checkpointing_with_compiled_experts_on_several_ranks_is_refused(kind):
    pair = [f"activation_checkpoint={kind}", "compile=true", BF16]
    with pytest.raises(
        ConfigError, match="use activation_checkpoint=full or none, compile=false or parallel.ep=1"
    ):
        load([*RUN, *pair, EP2])
    assert load([*RUN, *pair]).compile and load([*RUN, "compile=true", BF16, EP2]).compile


def test_what_selective_checkpointing_saves():
    """Grouped GEMMs are repeated unless they are asked for; nothing of ours is a bmm any more on a GPU."""
    stock, saving = (
        CHECKPOINTING[name].build().get_save_ops() for name in ("selective", "selective_experts")
    )
    assert not GROUPED_GEMMS & stock and saving == stock | GROUPED_GEMMS
