"""Context parallelism: rows cut over ranks give the losses, gradients and counts of one rank with whole
rows.
"""

import importlib
import inspect
from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention.flex_attention import and_masks, create_block_mask, create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torchtitan.models.common.attention import get_causal_mask_mod, get_sliding_window_mask_mod

from benchmarks.context import Turns, large, rows_of, slowest_over_mean
from tests.layouts import full
from tests.models import GQA
from tests.ranks import run_ranks
from tests.runs import metrics
from trainer import train
from trainer.config import load
from trainer.data import Batch
from trainer.lab.plan.watch import OPERATORS, group_of
from trainer.model import attention, compiled, context
from trainer.model.afmoe import PADDING, afmoe_config, moe_layers
from trainer.model.attention import MaskedSDPA
from trainer.model.context import Cut
from trainer.weights.export import OK as EXPORTED
from trainer.weights.export import main as export

SEQ_LEN, GLOBAL_BATCH, STEPS = 64, 4, 2
BASE = [
    "name=context",
    "model=debug",
    "model.num_layers=3",
    "model.global_every=3",
    "data=synthetic",
    "data.source.num_topics=8",
    "data.workers=0",
    f"steps={STEPS}",
    f"seq_len={SEQ_LEN}",
    f"global_batch={GLOBAL_BATCH}",
    "stage.warmup.share=0",
    "z_loss_weight=1e-3",
    "balance.sequence_loss_weight=0.01",
    "balance.switch_loss_weight=0.01",
    "balance.batch_loss_weight=0.01",
    "balance.router_z_loss_weight=0.001",
]


def batches(step: int) -> Batch:
    """Documents that lie across pieces, one as long as a row, padding, and labels that are missing."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 1024, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    positions = torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    labels = tokens[:, 1:].clone()
    for row, cuts in enumerate([(5, 13, 40), (), (29,), (17, 50)]):
        for cut in cuts:
            positions[row, cut:] = torch.arange(SEQ_LEN - cut)
            labels[row, cut - 1] = -100
    labels[0, :20] = -100
    positions[3, 60:], labels[3, 60:] = -1, -100
    return Batch(tokens[:, :-1], labels, positions)


def trained(overrides: list[str]) -> dict:
    """What a rank has after some steps."""
    run = train.build(load(BASE + overrides))
    layers, groups, micro = moe_layers(run.model), run.groups, run.config.micro_batch
    names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in run.model.named_parameters()]
    result = {"metrics": [], "counts": []}
    step_weights, balance = run.optimizer.step, run.balancer.step

    def snapshot_gradients():
        gradients = {name: full(p.grad) for name, p in zip(names, run.model.parameters(), strict=True)}
        result.setdefault("gradients", gradients)
        step_weights()

    def snapshot_counts(step):
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in layers])
        dist.all_reduce(counts_ME)
        result["counts"].append(counts_ME)
        return balance(step)

    run.optimizer.step, run.balancer.step = snapshot_gradients, snapshot_counts
    rows = GLOBAL_BATCH // groups.num_readers
    own = slice(groups.reader * rows, (groups.reader + 1) * rows)
    for step in range(STEPS):
        planes = [plane[own].split(micro) for plane in batches(step)]
        result["metrics"].append(
            train.train_step(run, [Batch(*parts) for parts in zip(*planes, strict=True)])
        )
    result["biases"] = [layer.expert_bias_E.clone() for layer in layers]
    return result


def all_trained(cases: list[list[str]]) -> list[dict]:
    return [trained(overrides) for overrides in cases]


# A piece of a row: 4, 8 or 16 tokens with cp=2 (4, 2 turns or 1); 2, 4 or 8 with cp=4.
WINDOWS = (4, 8, 9, 17, 32, 100)
MUON = ["optim=muon", "optim.lr=0.02"]
LAYOUTS = {
    2: [["parallel.cp=2"], ["parallel.cp=2", "parallel.ep=2", "activation_checkpoint=selective"]],
    4: [
        ["parallel.cp=4"],
        ["parallel.cp=4", "parallel.ep=4", "activation_checkpoint=full"],
        ["parallel.cp=4", "parallel.ep=2", "micro_batch=1"],
        ["parallel.cp=2", "parallel.dp_shard=2", "parallel.ep=4"],
        ["parallel.cp=2", "parallel.dp_replicate=2", "parallel.ep=2", "activation_checkpoint=full"],
        ["parallel.cp=2", "parallel.dp_replicate=2", "micro_batch=1", *MUON],
    ],
}
# Of each layout a window or two in `make test`, from below a piece to above the row.
QUICK = {2: [(0, 4), (0, 9), (1, 32)], 4: [(0, 8), (1, 4), (2, 100), (3, 9), (4, 17), (5, 32)]}
EVERY = {ranks: [(i, w) for i in range(len(layouts)) for w in WINDOWS] for ranks, layouts in LAYOUTS.items()}


def oracle_of(layout: list[str], window: int) -> list[str]:
    kept = [word for word in layout if word.startswith(("optim", "micro_batch"))]
    return ["micro_batch=2", *kept, f"model.window={window}"]


def assert_equal(got: dict, expected: dict) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got["counts"], expected["counts"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got["biases"], expected["biases"], strict=True))
    for ours, theirs in zip(got["metrics"], expected["metrics"], strict=True):
        for key in ("loss", "grad_norm", "balance/max_violation", "data/step_flop"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        # a small difference of large sums of float32
        assert ours["batch_het"] == pytest.approx(theirs["batch_het"], abs=1e-5)
    for name, gradient in expected["gradients"].items():
        error = (got["gradients"][name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < 1e-5, (name, error)


def check(num_ranks: int, cases: list[tuple[int, int]]) -> None:
    layouts = LAYOUTS[num_ranks]
    own = [["micro_batch=2", *layouts[i], f"model.window={window}"] for i, window in cases]
    oracles = {tuple(oracle_of(layouts[i], window)): None for i, window in cases}
    expected = dict(zip(oracles, run_ranks(all_trained, 1, list(map(list, oracles)))[0], strict=True))
    results = run_ranks(all_trained, num_ranks, own)
    for number, (i, window) in enumerate(cases):
        of_ranks = [result[number] for result in results]
        for got in of_ranks:
            assert_equal(got, expected[tuple(oracle_of(layouts[i], window))])
        assert all(got["metrics"] == of_ranks[0]["metrics"] for got in of_ranks), "the same bits on all ranks"


@pytest.mark.parametrize(
    "num_ranks", [n if n == 2 else pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS]
)
def test_cut_rows_equal_whole_ones(num_ranks):
    check(num_ranks, QUICK[num_ranks])


@pytest.mark.rare
@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_cut_rows_equal_whole_ones_in_every_layout_and_window(num_ranks):
    check(num_ranks, EVERY[num_ranks])


# -- without other ranks: what is held, seen and sent -----------------------------------------------------


def holder(token: int, *, size: int, turns: int) -> int:
    """Up and down through the ranks, as often as there are turns."""
    place = token // (SEQ_LEN // (2 * size * turns)) % (2 * size)
    return min(place, 2 * size - 1 - place)


def by_loop(rank: int, window: int | None, *, size: int, turns: int) -> tuple[list[int], list[int]]:
    """The tokens that a rank holds, and those that they may see."""
    own = [t for t in range(SEQ_LEN) if holder(t, size=size, turns=turns) == rank]
    seen = {s for t in own for s in range(0 if window is None else max(0, t - window + 1), t + 1)}
    return own, sorted(seen)


# by hand: the shortest piece of 64 / 2 C T tokens that is no shorter than half a window
TURNS = {
    (2, 8): 4,
    (2, 9): 2,
    (2, 16): 2,
    (2, 17): 1,
    (2, 100): 1,
    (4, 4): 4,
    (4, 5): 2,
    (4, 9): 1,
    (8, 2): 4,
}


@pytest.mark.parametrize(("size", "window"), TURNS)
def test_every_rank_holds_sees_and_gets_what_a_loop_over_tokens_says(size, window):
    turns = TURNS[size, window]
    cuts = [Cut(size=size, rank=rank, window=window) for rank in range(size)]
    for kind in (window, None):
        loops = [by_loop(rank, kind, size=size, turns=turns) for rank in range(size)]
        sent = []
        for cut, (own, seen) in zip(cuts, loops, strict=True):
            assert joined(cut.held(SEQ_LEN)) == own
            assert cut.own(torch.arange(SEQ_LEN)[None])[0].tolist() == own
            assert joined(cut.keys(SEQ_LEN, kind)) == seen
            exchange = cut.exchange(SEQ_LEN, kind)
            others = [[t for t in seen if t in theirs and t not in own] for theirs, _ in loops]
            assert exchange.receive_counts == list(map(len, others)) and exchange.num_keys == len(seen)
            assert [seen[i] for at in exchange.received for i in range(at.start, at.stop)] == joined(others)
            assert [seen[i] for at in exchange.own_in_keys for i in range(at.start, at.stop)] == own
            sent.append((exchange, [own[i] for at in exchange.sent for i in range(at.start, at.stop)]))
        for rank, (exchange, tokens) in enumerate(sent):  # what one sends is what the others wait for
            assert exchange.send_counts == [cut.exchange(SEQ_LEN, kind).receive_counts[rank] for cut in cuts]
            wanted = [[t for t in loops[rank][0] if t in seen] for _, seen in loops]
            assert tokens == joined(part for other, part in enumerate(wanted) if other != rank)


def joined(parts) -> list[int]:
    return [token for part in parts for token in part]


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_bytes_of_large_at_256k(size):
    """docs/long_context.md: K and V of a token are 2 x 8 heads x 128 x 2 bytes. In a local layer each piece
    wants the 4,095 tokens before it, but the row's first one and those whose neighbour is of the same rank.
    In a global one a rank whose last piece ends at token e wants e tokens and holds L / C.
    """
    length, window, token = 262_144, 4096, 2 * 8 * 128 * 2
    turns = {4: 4, 8: 4, 16: 4, 32: 2}[size]
    cuts = [Cut(size=size, rank=rank, window=window) for rank in range(size)]
    halo = [sum(cut.exchange(length, window).receive_counts) for cut in cuts]
    neighbours = 2 * turns - 1  # where the way through the ranks turns back
    first = max(0, window - 1 - length // (2 * size * turns))  # what is not there before the row's second
    assert sum(halo) == (2 * size * turns - 1 - neighbours) * (window - 1) - first
    assert max(halo) * token <= 2 * turns * 16 * 2**20  # 32 MiB and a turn, whatever the row's length
    whole = [sum(cut.exchange(length, None).receive_counts) for cut in cuts]
    assert whole == [length - rank * length // (2 * size * turns) - length // size for rank in range(size)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flex", [False, True], ids=["masked", "flex"])
@pytest.mark.parametrize(("size", "window"), [(2, 40), (4, 200), (4, 16), (2, 600)])
def test_attention_of_parts_is_that_of_the_whole_row(size, window, flex, monkeypatch):
    """Output, and the gradients summed over the ranks (of flex attention, which has none on a CPU, the
    output).
    """
    monkeypatch.setattr(compiled, "flex", flex_attention)
    monkeypatch.setattr(compiled, "block_mask", create_block_mask)
    length, shape = 512, replace(GQA, window=window, global_every=2, num_layers=2)
    positions_BL = torch.stack([torch.arange(length), torch.arange(length)])
    for row, cuts in enumerate([(3, 200, 401), (128, 300)]):
        for start in cuts:
            positions_BL[row, start:] = torch.arange(length - start)
    positions_BL[1, 450:] = PADDING
    with torch.device("meta"):
        model, oracle = (afmoe_config(shape, flex=kind).build() for kind in (flex, False))
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(2, length, heads, 16, generator=generator) for heads in (4, 2, 2, 4))
    for layer in ("0", "1"):
        inputs, kind = oracle.attention_inputs(positions_BL), window if layer == "0" else None
        mask = inputs.local_mask if kind else inputs.global_mask
        whole = [each.clone().requires_grad_() for each in (q, k, v)]
        expected = oracle.layers[layer].attention.inner_attention(
            *whole, attention_masks=mask, enable_gqa=True
        )
        expected.backward(grad)
        parts = [each.clone().requires_grad_(not flex) for each in (q, k, v)]
        for rank in range(size):
            model.cut = Cut(size=size, rank=rank, window=window)
            inputs = model.attention_inputs(positions_BL)
            own, seen = joined(model.cut.held(length)), joined(model.cut.keys(length, kind))
            mask = inputs.local_mask if kind else inputs.global_mask
            out = model.layers[layer].attention.inner_attention(
                parts[0][:, own], parts[1][:, seen], parts[2][:, seen], attention_masks=mask, enable_gqa=True
            )
            torch.testing.assert_close(out, expected[:, own], rtol=0, atol=2e-6)
            if not flex:
                out.backward(grad[:, own])
        for ours, theirs in zip(parts, whole, strict=True):
            if not flex:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("most_kept", [0, 2**24])
def test_masks_of_blocks_give_the_bits_of_torchs_attention(most_kept, monkeypatch):
    """Output and gradients are those of scaled_dot_product_attention under the mask of all pairs, one block
    of queries after another; whether blocks are kept or made again.
    """
    monkeypatch.setattr(attention, "MOST_KEPT", most_kept)
    generator = torch.Generator().manual_seed(0)
    length, window = 300, 50
    q, k, v, grad = (torch.randn(2, length, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    mods = {
        window: and_masks(get_causal_mask_mod(), get_sliding_window_mask_mod(window)),
        None: get_causal_mask_mod(),
    }
    for kind, mod in mods.items():
        row = [range(length)]
        attends = MaskedSDPA(MaskedSDPA.Config())
        blocks = attends.mask(mod, 2, row, row, window=kind, device=torch.device("cpu"))
        assert bool(blocks.kept) == bool(most_kept)
        ours, theirs = ([each.clone().requires_grad_() for each in (q, k, v)] for _ in range(2))
        out = attends(*ours, attention_masks=blocks, enable_gqa=True)
        mask = create_mask(mod, 2, None, length, length, device="cpu")
        parts = []
        for start in range(0, length, attends.query_block):
            end = min(start + attends.query_block, length)
            keys = slice(max(0, start - window + 1) if kind else 0, end)
            heads = [each.transpose(1, 2) for each in theirs]
            part = F.scaled_dot_product_attention(
                heads[0][:, :, start:end], heads[1][:, :, keys], heads[2][:, :, keys],
                attn_mask=mask[:, :, start:end, keys], enable_gqa=True,
            )  # fmt: skip
            parts.append(part.transpose(1, 2))
        expected = torch.cat(parts, dim=1)
        assert torch.equal(out, expected)
        out.backward(grad)
        expected.backward(grad)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


# -- on the wire ------------------------------------------------------------------------------------------


def sizes_sent(overrides: list[str]) -> list[tuple[int, int]]:
    """[bytes] sent and received in each exchange of a step of one microbatch."""
    exchange, sizes = dist.all_to_all_single, []

    def counted(received, sent, *args, **kwargs):
        sizes.append((sent.numel() * sent.element_size(), received.numel() * received.element_size()))
        return exchange(received, sent, *args, **kwargs)

    run = train.build(load(BASE + overrides))
    with patch.object(context.dist, "all_to_all_single", counted):
        train.train_step(run, [batches(0)])
    return sizes


def all_sizes_sent(cases: list[list[str]]) -> list[list[tuple[int, int]]]:
    return [sizes_sent(overrides) for overrides in cases]


def test_what_is_sent_is_what_the_arithmetic_says():
    """4 ranks; layers 0 and 1 are local, 2 is global. Two heads of keys and values, 16 float32 each."""
    windows = {4: 4, 9: 1}  # and the turns
    cases = [["parallel.cp=4", f"micro_batch={GLOBAL_BATCH}", f"model.window={w}"] for w in windows]
    heads = load(BASE + cases[0]).model
    token = 2 * heads.num_kv_heads * heads.head_dim * 4 * GLOBAL_BATCH
    for rank, of_windows in enumerate(run_ranks(all_sizes_sent, 4, cases)):
        for (window, turns), sizes in zip(windows.items(), of_windows, strict=True):
            expected = []
            for kind in (window, window, None):
                loops = [by_loop(r, kind, size=4, turns=turns) for r in range(4)]
                own, seen = loops[rank]
                wanted = [len(set(own) & set(theirs)) for r, (_, theirs) in enumerate(loops) if r != rank]
                expected.append((sum(wanted) * token, (len(seen) - len(own)) * token))
            assert sizes == [*expected, *((there, back) for back, there in reversed(expected))]


class Order(TorchDispatchMode):
    """Which collectives does a rank call, over which axis of the mesh, one after another?"""

    def __init__(self) -> None:
        super().__init__()
        self.calls = list[tuple[str, int, int]]()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator._overloadpacket.__name__
        if operator.namespace in ("c10d", "_c10d_functional") and name in OPERATORS:
            ranks = dist.get_process_group_ranks(group_of(args, kwargs or {}))
            self.calls.append((name, len(ranks), ranks[1] - ranks[0] if len(ranks) > 1 else 0))
        return operator(*args, **(kwargs or {}))


def order(overrides: list[str]) -> list[tuple[str, int, int]]:
    run = train.build(load(BASE + overrides))
    own = run.groups.reader, run.groups.num_readers
    rows = GLOBAL_BATCH // own[1]
    planes = [plane[own[0] * rows : (own[0] + 1) * rows].split(1) for plane in batches(0)]
    with Order() as watch:
        train.train_step(run, [Batch(*parts) for parts in zip(*planes, strict=True)])
    return watch.calls


@pytest.mark.slow
def test_no_order_of_collectives_differs_between_ranks():
    """Padding lies on one rank only. Of each microbatch and layer an exchange forward, one where the layer is
    repeated, one backward.
    """
    for layout, num_micro in (
        (["parallel.cp=4", "parallel.ep=4"], 4),
        (["parallel.cp=2", "parallel.dp_shard=2", "parallel.ep=4"], 2),
    ):
        calls = run_ranks(order, 4, [*layout, "micro_batch=1", "activation_checkpoint=full"])
        assert all(of_rank == calls[0] for of_rank in calls)
        names = Counter(name for name, *_ in calls[0])
        assert names["alltoall_base_"] == 3 * 3 * num_micro
        assert names["all_to_all_single"] and names["_allgather_base_"] and names["_reduce_scatter_base_"]


# -- a run ------------------------------------------------------------------------------------------------


SOURCES = {"sorting": ("argparse", "heapq"), "numbers": ("statistics", "fractions")}
REAL = [
    "name=real",
    "model=debug",
    "model.num_layers=3",
    "model.global_every=3",
    "data=txt",
    "data.source=null",
    "data.workers=0",
    "data.num_streams=4",
    "data.buffer=2",
    "data.source_loss=true",
    "seq_len=64",
    "global_batch=4",
    "micro_batch=1",
    "stage=constant",
    "checkpoint.interval=2",
    "checkpoint.keep=9",
    "balance.sequence_loss_weight=0.01",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("real")
    for name, modules in SOURCES.items():
        (root / name).mkdir()
        for module in modules:
            (root / name / f"{module}.txt").write_text(inspect.getsource(importlib.import_module(module)))
    nodes = [f"{name}: {{_target_: trainer.data.TextSource, path: {root / name}}}" for name in SOURCES]
    return [*REAL, f"data.sources={{{', '.join(nodes)}}}", f"data.cache_dir={root / 'cache'}"]


def run_on(overrides: list[str]) -> int:
    return train.train(load(overrides))


@pytest.mark.slow
def test_a_run_moves_from_one_rank_to_two_and_four_that_share_rows(tmp_path, real):
    """The same data, the losses to 1e-5, those of each source too; and the export of what it ends with is
    what transformers computes.
    """
    run_ranks(run_on, 1, [*real, f"run_dir={tmp_path / 'one'}", "steps=6"])
    moves = [(1, [], 2), (2, ["parallel.cp=2"], 4), (4, ["parallel.cp=4", "parallel.ep=2"], 6)]
    for num_ranks, layout, steps in moves:
        run_ranks(run_on, num_ranks, [*real, *layout, f"run_dir={tmp_path / 'moved'}", f"steps={steps}"])
    one, moved = metrics(tmp_path / "one" / "real"), metrics(tmp_path / "moved" / "real")
    assert [line["step"] for line in moved] == list(range(1, 7))
    for ours, theirs in zip(moved, one, strict=True):
        assert ours.keys() == theirs.keys() and {"loss/numbers", "loss/sorting"} <= ours.keys()
        for key, value in theirs.items():
            if key.startswith("data/") or key in ("tokens", "documents"):
                assert ours[key] == value, (ours["step"], key)
            elif not key.startswith(("balance/gain", "batch_het")):
                assert ours[key] == pytest.approx(value, rel=1e-4 if "/" in key else 1e-5), key
    assert export([str(tmp_path / "moved/real"), str(tmp_path / "out"), "--verify"]) == EXPORTED


def needles_found(overrides: list[str]) -> tuple[dict, list]:
    run = train.start(load(overrides))
    seen, result = [], run.evaluations.named["niah"].result

    def kept(measured):
        seen.extend((one.loss_G, one.targets_G, one.hits_G) for one in measured)
        return result(measured)

    run.evaluations.named["niah"].result = kept
    run.evaluations.make(run, ["niah"])
    return run.evaluations.results[0], seen


@pytest.mark.slow
def test_needles_lie_in_cut_rows_of_any_length(tmp_path, real):
    """150 tokens are no multiple of 2 x 4: the rows get padding, and the sums stay."""
    sizes = "lengths: [150, 256], samples: 2, digits: 2, keys: 2"
    node = f"evaluate.niah={{_target_: trainer.evaluate.Needles, {sizes}}}"
    words = [*real, node, "data.holdout=0", "steps=2", f"run_dir={tmp_path}"]
    [(result, expected)] = run_ranks(needles_found, 1, words)
    for of_rank, seen in run_ranks(needles_found, 4, [*words, "parallel.cp=4", "parallel.ep=2"]):
        assert of_rank == result
        for ours, theirs in zip(seen, expected, strict=True):
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])


# -- work -------------------------------------------------------------------------------------------------


def test_the_slowest_of_eight_ranks_has_at_most_115_hundredths_of_the_mean_on_packed_rows():
    """In FLOP of a whole step of Large; 90 % of the tokens are in documents of half a row to a row. One turn
    up and down, which is common, leaves it more than that.
    """
    model, rows = large(), rows_of(0.9, count=8)
    ours = [Cut(size=8, rank=rank, window=model.window) for rank in range(8)]
    one_turn = [Turns(size=8, rank=rank, window=1) for rank in range(8)]
    assert slowest_over_mean(model, ours, rows) <= 1.15
    assert slowest_over_mean(model, one_turn, rows) > 1.15
    whole = [torch.arange(2**18)]
    assert slowest_over_mean(model, ours, whole) == pytest.approx(1, abs=0.01)
