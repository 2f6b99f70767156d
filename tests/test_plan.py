"""The plan of a run: what small traces add up to is what the whole model does, on ranks that are not there
and on ranks that are.
"""

from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO

import pytest
import torch
import torch.distributed as dist

from tests.fake import in_a_process
from tests.ranks import run_ranks
from trainer.config import ConfigError, ParallelConfig, load
from trainer.lab.digits import short
from trainer.lab.plan import fake
from trainer.lab.plan import hardware as devices
from trainer.lab.plan import search as searched
from trainer.lab.plan.__main__ import main
from trainer.lab.plan.calibration import Calibration, read
from trainer.lab.plan.clock import Clock
from trainer.lab.plan.hardware import hardware
from trainer.lab.plan.keys import Keys
from trainer.lab.plan.layout import Layout, Traffic, memory, sent_on, traffic
from trainer.lab.plan.optimizer import OptimizerStep, OptimizerSteps
from trainer.lab.plan.plan import plan, refuse_unfit
from trainer.lab.plan.search import micro_batches
from trainer.lab.plan.table import warnings
from trainer.lab.plan.trace import build, traced
from trainer.lab.plan.watch import KINDS, Sent, Watch
from trainer.lab.plan.whole import Traces
from trainer.lab.preview.__main__ import main as preview
from trainer.model.afmoe import afmoe_config
from trainer.model.frozen import train_only
from trainer.model.parallelize import build_parallel, reduce_over_replicas
from trainer.program import program_of
from trainer.ranks import device
from trainer.ranks.local import local, scale_gradients, squared_gradient_norm, trained
from trainer.run.build import build_optimizer
from trainer.size import flops_per_token

# replicate, shard, ep: HSDP x EP; experts cut inside their matrices, as 16 ranks share 8
FEW = [(2, 4, 2), (1, 16, 1)]
LAYOUTS = [*FEW, (4, 4, 1), (1, 4, 1), (2, 2, 1), (1, 4, 2), (1, 8, 4), (2, 2, 2), (1, 16, 2)]
SETTINGS = ["name=x", "steps=1", "seq_len=64", "global_batch=48", "micro_batch=1", "dtype=bfloat16"]
FREE = OptimizerStep(0.0, 0.0, 0.0, 0.0, 0, Counter())


def config_of(*overrides: str):
    return load(["model=debug", *SETTINGS, *overrides])


def sums(sent: Counter) -> dict:
    """Bytes by phase, operator and what is carried."""
    total = Counter()
    for key, size in sent.items():
        total[key.phase, key.operator, key.part] += size
    return {key: size for key, size in total.items() if size}


# -- against a trace of the whole model ------------------------------------------------------------------


def compared(policy, layouts, overrides):
    config = config_of("model.num_layers=4", *overrides)
    return compare(Traces(config), policy, layouts)


def compare(traces, policy, layouts):
    config, rows = traces.config, []
    for degrees in layouts:
        layout = Layout(degrees[0] * degrees[1], degrees[0], degrees[2], 1, policy)
        fit = traces.whole(layout.variant(config.model.num_experts))
        whole = traced(config, config.model, degrees, policy, tokens=traces.tokens)
        needs = memory(layout, fit, FREE, hardware("h200"), tokens=traces.tokens, accumulation=1)
        rows.append(
            {
                "degrees": degrees,
                "flop": (dict(fit.flop), dict(whole.flop)),
                "sent": (sums(sent_on(layout, fit, tokens=traces.tokens)), sums(whole.sent)),
                "peak": (sum(needs.kinds.values()), max(m.sum((1, 2)).max() for m in whole.moments.values())),
                "gradients": [gradients_of(each, layout) for each in (fit, whole)],
            }
        )
    return rows


def gradients_of(each, layout):
    """[bytes] of a rank after a backward pass."""
    held = each.after["backward"][KINDS.index("gradients")][:2].sum()
    return held * each.degrees[1] / layout.shards


def check_sums(rows):
    for row in rows:
        flop, whole_flop = row["flop"]
        assert flop == pytest.approx(whole_flop, rel=1e-12), row["degrees"]
        sent, whole_sent = row["sent"]
        assert sent == pytest.approx(whole_sent, rel=1e-12), row["degrees"]
        assert row["peak"][0] == pytest.approx(row["peak"][1], rel=0.01), row["degrees"]
        assert row["gradients"][0] == pytest.approx(row["gradients"][1], rel=0.01), row["degrees"]


def selective_plan():
    """What two tests compare, of one set of traces."""
    traces = Traces(config_of(*SMALL))
    return compare(traces, "selective", FEW), planned_bytes(traces, FOUR, "selective")


@pytest.fixture(scope="module")
def selective(tmp_path_factory):
    return in_a_process(selective_plan, tmp_path_factory.mktemp("selective"))


@pytest.mark.slow
def test_small_traces_add_up_to_the_whole(selective):
    check_sums(selective[0])


@pytest.mark.rare
@pytest.mark.parametrize("policy", ["none", "full"])
def test_small_traces_add_up_to_the_whole_everywhere(policy, tmp_path):
    check_sums(in_a_process(compared, tmp_path, policy, LAYOUTS, []))


@pytest.mark.slow
def test_small_traces_add_up_where_parts_are_frozen(tmp_path):
    """Of global layers alone there are gradients: of attention and experts, but nothing of dense layers."""
    overrides = ["train_only=[global_layers]", "model.num_layers=5", "model.num_dense_layers=2"]
    rows = in_a_process(compared, tmp_path, "none", [(2, 4, 2)], [*overrides, "model.global_every=5"])
    check_sums(rows)


def optimizer_steps(meshes, overrides):
    """By mesh: what is counted, and what the optimizer does to DTensors on the fake device."""
    config = config_of("optim=muon", "model.num_layers=2", *overrides)
    counted = OptimizerSteps(config)
    return [(vars(counted.on(degrees)), traced_step(config, degrees)) for degrees in meshes]


def traced_step(config, degrees):
    """The second step, for which the state is there."""
    with fake.ranks(degrees[0] * degrees[1]) as mode:
        model = build(config, mode, degrees=degrees, policy="none", tokens=2)
        watch = model.watch
        with mode, watch, watch.making("optimizer", 0.0):
            for p in trained(model.net):
                p.grad = torch.empty_like(p)
            optimizer = build_optimizer(config, model.net)
            before = watch.live.sum()
            optimizer.step()
            state = watch.live.sum() - before
            watch.moments.clear()
            before = watch.live.sum()
            with watch.during("optimizer"):
                squared_gradient_norm(model.net)
                scale_gradients(model.net, 1.0)
                optimizer.step()
    of_phase = [
        sum(n for key, n in counts.items() if key[0] == "optimizer") for counts in (watch.flop, watch.moved)
    ]
    peak = max(live.sum() for _, live in watch.moments) - before
    sent = Counter({key: n for key, n in watch.sent.items() if key.phase == "optimizer"})
    return {
        "flop": of_phase[0],
        "moved": of_phase[1],
        "kernels": watch.kernels["optimizer"],
        "peak": peak,
        "state": state,
        "sent": sent,
    }


@pytest.mark.parametrize(
    ("meshes", "overrides"),
    [
        ([(2, 4, 2), (4, 4, 1)], []),
        pytest.param(
            [(1, 1, 1), (2, 1, 1), (3, 4, 1), (1, 8, 8), (1, 16, 2), (1, 64, 2)], [], marks=pytest.mark.rare
        ),
        pytest.param([(2, 4, 2)], ["optim=adamw"], marks=pytest.mark.rare),
        pytest.param([(2, 4, 2)], ["train_only=[local_experts]"], marks=pytest.mark.rare),
    ],
)
def test_the_optimizers_step_is_counted_on_each_mesh(meshes, overrides, tmp_path):
    """Muon's rounds on outlines do what they do to tensors. Scalars of the gradient's norm are left out, and
    that the first of 64 ranks has a whole row where others have none."""
    steps = in_a_process(optimizer_steps, tmp_path, meshes, overrides)
    for (_, shards, _), (counted, whole) in zip(meshes, steps, strict=True):
        for key in ("flop", "kernels", "sent"):
            assert counted[key] == whole[key], key
        assert counted["peak"] == pytest.approx(whole["peak"], abs=64)
        for key in ("moved", "state"):
            assert counted[key] == pytest.approx(whole[key], rel=0.01 if shards < 64 else 0.05), key


# -- against ranks that are there ------------------------------------------------------------------------


FOUR = [(1, 4, 1), (2, 2, 1), (1, 4, 2), (2, 2, 2)]  # FSDP, HSDP, EP, HSDP x EP
DENSE = ["model.num_layers=2", "model.num_dense_layers=2"]
SMALL = ["model.num_layers=4", "seq_len=62", "global_batch=12"]
FROZEN = ["train_only=[global_experts]", "optim=muon", *SMALL]


def sent_by_ranks():
    """What a rank of a real run hands to its collectives in a step's microbatches, by layout and number."""
    config = config_of(*SMALL)
    return {
        (degrees, accumulation): sent_in_step(net, accumulation)
        for degrees in FOUR
        for net in [real_model(config, degrees, policy="selective")]
        for accumulation in (1, 3)
    }


def real_model(config, degrees, *, policy="none"):
    replicate, shard, ep = degrees
    torch.manual_seed(dist.get_rank())
    layout = ParallelConfig(dp_replicate=replicate, dp_shard=shard, ep=ep)
    dims = device.build_mesh(layout, num_experts=config.model.num_experts)
    shape = afmoe_config(config.model, flex=False)
    net = build_parallel(shape, dims, dtype=torch.bfloat16, activation_checkpoint=policy)
    if config.train_only is not None:
        train_only(net, config.train_only)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.normal_(p.to_local(), std=0.02)
    for module in net.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=torch.device("cpu"))
    return net


def sent_in_step(net, accumulation):
    watch = Watch(device_type="none")
    rows = torch.randint(net.config.vocab_size, (1, 62))
    positions = torch.arange(62)[None]
    with watch:
        for i in range(accumulation):
            with watch.during("forward"):
                loss = net(rows, positions, rows, None)
            reduce_over_replicas(net, now=i == accumulation - 1)  # as run/step.backward does
            with watch.during("backward"):
                loss.backward()
    return sums(watch.sent)


def planned_bytes(traces, degrees_of_all, policy):
    planned = []
    for replicate, shard, ep in degrees_of_all:
        layout = Layout(replicate * shard, replicate, ep, 1, policy)
        planned.append(sums(sent_on(layout, traces.whole(layout.variant(8)), tokens=62)))
    return planned


@pytest.mark.slow
def test_four_ranks_send_what_was_planned(selective):
    ranks = run_ranks(sent_by_ranks, 4)
    for degrees, expected in zip(FOUR, selective[1], strict=True):
        for accumulation in (1, 3):
            mean = Counter()
            for of_rank in ranks:  # a rank sends on as many rows as reached its experts: the mean is even
                for key, size in of_rank[degrees, accumulation].items():
                    mean[key] += size / 4 / (1 if key[1] == "all-reduce" else accumulation)
            assert expected == pytest.approx(dict(mean), rel=1e-12), (degrees, accumulation)


def frozen_plan(overrides):
    config = config_of(*overrides)
    [sent] = planned_bytes(Traces(config), [(1, 2, 1)], "none")
    return sent, OptimizerSteps(config).on((1, 2, 1)).state


def frozen_by_ranks(overrides):
    """What a rank sends in a microbatch, and [bytes] of its optimizer's state, where parts are frozen."""
    config = config_of(*overrides)
    net = real_model(config, (1, 2, 1))
    sent, optimizer = sent_in_step(net, 1), build_optimizer(config, net)
    optimizer.step()
    kept = [
        local(value).nbytes
        for each in optimizer.optimizers
        for state in each.state.values()
        for value in state.values()
    ]
    return sent, sum(kept)


@pytest.mark.slow
def test_two_ranks_reduce_and_keep_what_was_planned_of_frozen_parts(tmp_path):
    """By hand: of the one global layer, 8 routed experts and a shared one of 3 x 32 x 64, in float32. A rank
    keeps half of them as momentum."""
    planned, state = in_a_process(frozen_plan, tmp_path, FROZEN)
    expert = 3 * 32 * 64 * 4
    reduced = {part: n for (_, operator, part), n in planned.items() if operator == "reduce-scatter"}
    assert reduced == {"experts": pytest.approx(8 * expert), "rest": pytest.approx(expert)}
    assert state == 9 * expert / 2
    for sent, kept in run_ranks(frozen_by_ranks, 2, FROZEN):
        assert sent == pytest.approx(planned, rel=1e-12)
        assert kept == state


def keys_by_ranks(policy):
    """[bytes] that go through the exchanges of keys and values of a microbatch, by phase."""
    config = config_of("seq_len=128")
    dims = device.build_mesh(ParallelConfig(cp=2), num_experts=config.model.num_experts)
    shape = afmoe_config(config.model, flex=False)
    net = build_parallel(shape, dims, dtype=torch.bfloat16, activation_checkpoint=policy)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.normal_(p.to_local(), std=0.02)
    watch, rows = Watch(device_type="none"), torch.randint(config.model.vocab_size, (1, 64))
    with watch:
        with watch.during("forward"):
            loss = net(rows, None, rows, None)
        with watch.during("backward"):
            loss.backward()
    return {phase: n for (phase, operator, _), n in sums(watch.sent).items() if operator == "all-to-all"}


@pytest.mark.parametrize("policy", ["none", "full"])
def test_two_ranks_that_share_rows_send_the_planned_keys(policy):
    """As much as the rank that fetches most; its own half of an all-to-all does not travel."""
    config = config_of("seq_len=128")
    layout = Layout(2, 1, 1, 1, policy, cp=2)
    planned = Keys(config, layout, program_of(config).spans[0].now).sent
    of_ranks = run_ranks(keys_by_ranks, 2, policy)
    assert {key.phase: n / 2 for key, n in planned.items()} == {
        phase: max(one[phase] for one in of_ranks) for phase in ("forward", "backward")
    }


def cut_or_whole(overrides):
    """[bytes] and FLOP of a rank in a step, for each degree of cp."""
    config = config_of(*overrides)
    traces, clock = Traces(config), Clock(config, hardware("h200"), imbalance=0.0)
    results = []
    for cp in (1, 2, 4):
        layout = Layout(4, 1, 1, 1, "none", cp=cp)
        step = clock.step(layout, traces.whole(layout.variant(8)), program_of(config).spans[0].now)
        results.append((step.memory.kinds["activations"], step.flop, step.accumulation))
    return results


def test_ranks_that_share_rows_have_a_part_of_the_activations_and_all_of_the_work(tmp_path):
    """The work of a step is that of whole rows, in as many more microbatches."""
    whole, two, four = in_a_process(cut_or_whole, tmp_path, ["seq_len=4096", "global_batch=8"])
    assert [one[2] for one in (whole, two, four)] == [2, 4, 8]
    for other in (two, four):
        assert other[1] == pytest.approx(whole[1], rel=1e-9)
    assert 0.2 < four[0] / whole[0] < 0.4 < two[0] / whole[0] < 0.7


# -- a row of the search, and dtypes ------------------------------------------------------------------------


def rows_and_plans(overrides):
    """Of the search's best and worst: what it says, and what a plan of that layout alone says."""
    searched.POLICIES, searched.MOST_REFINED = ("none",), 0
    config = config_of(*overrides)
    steps = plan(config, hardware("h200"), Calibration("h200")).search.steps
    steps.sort(key=lambda step: step.seconds)
    return [
        (
            step,
            plan(
                config_of(*overrides, *step.layout.overrides()),
                hardware("h200"),
                Calibration("h200"),
                searches=False,
            ).main.step,
        )
        for step in (steps[0], steps[-1])
    ]


@pytest.mark.slow
def test_a_row_of_the_search_is_the_plan_of_its_layout(tmp_path):
    [best, worst] = in_a_process(rows_and_plans, tmp_path, ["optim=muon", *DENSE, "parallel.dp_shard=4"])
    assert best[0].layout.degrees != worst[0].layout.degrees
    for row, planned in (best, worst):
        assert row == planned


def dtype_traces(dtypes):
    """Of a dense and an MoE layer: bytes by collective, FLOP, waits, speeds, and bytes of activations."""
    results = []
    for dtype, expert_dtype in dtypes:
        config = config_of(f"dtype={dtype}", f"model.expert_dtype={expert_dtype}", "model.num_layers=2")
        trace = traced(config, config.model, (1, 4, 2), "none", tokens=62)
        clock = Clock(config, hardware("h200"), imbalance=0.0)
        speeds = [clock.speed(kind) for kind in ("matmul", "experts", "attention")]
        kept = trace.after["forward"][KINDS.index("activations")].sum()
        results.append((sums(trace.sent), trace.flop, trace.waits, speeds, kept))
    return results


@pytest.mark.slow
def test_float32_doubles_the_bytes_and_is_no_tensor_core_s_work(tmp_path):
    """But gradients are reduced in float32 as ever, and counts of tokens are integers. Experts wait for the
    host: three products of a layer forward, six backward."""
    dtypes = [("bfloat16", "null"), ("float32", "null"), ("bfloat16", "float32")]
    half, full, mixed = in_a_process(dtype_traces, tmp_path, dtypes)
    for key, size in half[0].items():
        same = key[1] in ("reduce-scatter", "all-reduce") or key[2] == "counts"
        assert full[0][key] == (1 if same else 2) * size, key
    assert half[0] == mixed[0]
    assert half[1] == full[1] == mixed[1]
    assert half[4] < full[4] < 2 * half[4]
    waits = [
        Counter({phase: n for (phase, what), n in one[2].items() if what == "rows of experts"})
        for one in (half, full, mixed)
    ]
    assert waits == [{}, {"forward": 3, "backward": 6}, {"forward": 3, "backward": 6}]
    slow, fast = 67e12, 989e12
    assert half[3] == pytest.approx([fast * 0.75, fast * 0.6, fast * 0.38])
    assert full[3] == pytest.approx([slow * 0.75, slow * 0.6, slow * 0.38])
    assert mixed[3] == pytest.approx([fast * 0.75, slow * 0.6, fast * 0.38])


def preview_by_device(arguments):
    """[days] that a preview prints, and that the plan says at the longest."""
    printed = StringIO()
    with redirect_stdout(printed):
        assert preview(arguments) == 0
    config = load([word for word in arguments if not word.startswith(("device", "out"))])
    planned = plan(config, hardware("h200"), Calibration("h200"), searches=False)
    return printed.getvalue(), planned.seconds * planned.calibration.width / 86400


def test_a_preview_takes_its_speed_from_the_plan(tmp_path):
    words = [
        "model=debug",
        *SETTINGS,
        "steps=1000000",
        *DENSE,
        "parallel=fsdp",
        "parallel.dp_shard=2",
    ]
    printed, days = in_a_process(
        preview_by_device, tmp_path, [*words, "device=h200", f"out={tmp_path}/x.html"]
    )
    assert f"days {short(days)} " in " ".join(printed.split()), printed


def gap_to_the_best(experiment, device, policies):
    """How much longer a step takes than the best one on its mesh that reduces in float32."""
    searched.POLICIES, config = policies, load([f"experiment={experiment}"])
    every = searched.space_of

    def of_mesh(*args, **kwargs):
        mesh = config.parallel.dp_replicate, 1
        return (layout for layout in every(*args, **kwargs) if (layout.dp_replicate, layout.cp) == mesh)

    searched.space_of = of_mesh
    planned = plan(config, hardware(device), Calibration(device))
    best = next(step for step in planned.search.best if step.layout.reduce_dtype == "float32")
    return planned.main.step.seconds / best.seconds - 1


@pytest.mark.rare
@pytest.mark.parametrize(
    ("experiment", "device", "policies"),
    [
        ("trinity_nano", "h200", ("none", "selective_experts")),
        ("trinity_mini", "h200", ("none", "selective_experts")),
        ("trinity_large", "b300", ("selective", "full")),
    ],
)
def test_an_experiment_has_the_best_layout_of_the_published_mesh(experiment, device, policies, tmp_path):
    """Of the two ways of checkpointing that came first among all."""
    assert in_a_process(gap_to_the_best, tmp_path, experiment, device, policies) <= 0.0


# -- FLOP, memory and links by hand ------------------------------------------------------------------------


def flop_of_a_step(overrides):
    config = config_of(*overrides)
    whole = Traces(config).whole(Layout(8, 1, 2, 1, "none").variant(config.model.num_experts))
    return whole.flop, whole.tokens


def test_flop_is_that_of_the_model(tmp_path):
    """Without recomputation: flops_per_token plus 2 H N more a pair, as flex attention's backward multiplies
    five times, not four; less norm gains (0.03 % of Nano)."""
    overrides = [
        "model.vocab_size=4096",
        "model.dim=256",
        "model.expert_dim=128",
        "model.head_dim=64",
        "model.ffn_dim=512",
    ]
    flop, tokens = in_a_process(flop_of_a_step, tmp_path, overrides)
    config = config_of(*overrides)
    m, length = config.model, config.seq_len
    local = sum(min(i + 1, m.window) for i in range(length))
    whole = length * (length + 1) // 2
    pairs = {"attention 32": local, "attention 0": whole}
    total = sum(n * (pairs[part] if part in pairs else length / tokens) for (_, part), n in flop.items())
    num_global = m.num_layers // m.global_every
    extra = 2 * m.num_heads * m.head_dim * (num_global * whole + (m.num_layers - num_global) * local)
    gains = m.num_layers * (4 * m.dim + 2 * m.head_dim) + m.dim  # counted as if they were in a product
    expected = flops_per_token(m, seq_len=length) * length - 6 * gains * length + extra
    assert total == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("key", "per_node", "expected"),
    [
        # 100 bytes gathered by 4 ranks of a node: each receives three quarters
        (Sent("forward", "all-gather", 4, 1, "rest"), 8, Traffic(75, 0)),
        # 16 ranks, one of each node: 15 of 16 parts come by the NIC
        (Sent("forward", "all-gather", 16, 8, "experts"), 8, Traffic(0, 93.75)),
        # two whole nodes of 8: half is another node's and comes in once, an eighth by each NIC
        (Sent("forward", "all-gather", 16, 1, "rest"), 8, Traffic(93.75 - 6.25, 6.25)),
        (Sent("backward", "all-reduce", 2, 8, "rest"), 8, Traffic(0, 100)),
        # of 16 ranks, 7 are others of the node and 8 are elsewhere
        (Sent("forward", "all-to-all", 16, 1, "tokens"), 8, Traffic(43.75, 50)),
        (Sent("forward", "all-to-all", 1, 0, "tokens"), 8, Traffic(0, 0)),
    ],
)
def test_bytes_by_link(key, per_node, expected):
    assert traffic(key, 100, per_node=per_node) == pytest.approx(expected)


def test_a_layout_is_a_command_that_training_takes():
    """12,288 sequences on 2,048 ranks are 6 a rank, 16,384 are 8."""
    config = load(["experiment=trinity_large"])
    layout = Layout(2048, 16, 8, 8, "full")
    words = micro_batches(program_of(config), layout)
    assert words == ["stage.warmup.micro_batch=6", "stage.phase1_larger_batch.micro_batch=8"]
    again = program_of(load(["experiment=trinity_large", *layout.overrides(), *words]))
    assert [span.now.micro_batch for span in again.spans] == [6, 6, 8, 8, 8, 8]
    again.check_split(num_ranks=2048, num_streams=2048)


# -- wrong input -------------------------------------------------------------------------------------------


LARGE = ["experiment=trinity_large"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (LARGE, ["not set: device", "device=h200"]),
        (
            [*LARGE, "device=b300", "model.expert_dtype=mxfp8"],
            ["model.expert_dtype=mxfp8", "float32 and bfloat16 alone", "model.expert_dtype=bfloat16"],
        ),
        ([*LARGE, "device=b30"], ["device=b30", "did you mean b300"]),
        ([*LARGE, "device=b300", "ranks=1000"], ["parallel.dp_replicate=16", "1000 ranks", "use one of"]),
        ([*LARGE, "device=b300", "ranks=x"], ["ranks=x", "whole number"]),
        (
            [*LARGE, "device=b300", "parallel.ep=512"],
            ["parallel.ep=512", "model.num_experts=256", "use one of"],
        ),
        ([*LARGE, "device=b300", "micro_batch=5"], ["micro_batch=5", "use one of"]),
        ([*LARGE, "device=b300", "price=much"], ["price=much", "a number from 0"]),
        ([*LARGE, "device=b300", "imbalance=-1"], ["imbalance=-1", "a number from 0"]),
        ([*LARGE, "device=b300", "calibration=no.json"], ["calibration=no.json", "tests/gpu writes"]),
        ([*LARGE, "device=b300", "parallel.dp_shard=null"], ["parallel.dp_shard=null", "ranks="]),
        ([*LARGE, "devices=b300"], ["devices", "did you mean device"]),
        ([*LARGE, "device=b300", "span=phase4"], ["span=phase4", "phase1", "use one of them"]),
        (
            [*LARGE, "device=b300", "parallel.cp=4", "ranks=2048"],
            ["parallel.dp_shard=128 x parallel.cp=4 = 8192 ranks", "use parallel.dp_shard=32"],
        ),
        (
            [*LARGE, "device=b300", "parallel=ranks_2048_cp4", "stage.phase2.seq_len=8196"],
            ["stage.phase2: seq_len=8196", "use seq_len=8192 or 8200"],
        ),
    ],
)
def test_wrong_input_gets_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert all(word in said for word in words), said


def refused_as_never_fitting(overrides):
    config = load(overrides)
    small = hardware("h200")
    small.memory = replace(small.memory, value=3.0001)  # what CUDA and NCCL take, and a little
    [warning] = warnings(plan(config, small, Calibration("h200"), ranks=4, searches=False))
    assert " of 3 GiB a rank for rows of 64 tokens" in warning and "parallel.cp=2 or more" in warning
    planned = plan(config, small, Calibration("h200"), ranks=4)
    try:
        refuse_unfit(planned)
    except ConfigError as error:
        return str(error)


@pytest.mark.rare
def test_a_model_that_never_fits_is_refused(tmp_path):
    said = in_a_process(refused_as_never_fitting, tmp_path, ["model=debug", *SETTINGS, "parallel=fsdp"])
    assert "no layout on 4 ranks fits" in said and "GiB" in said and "more ranks=" in said


# -- devices and calibration -------------------------------------------------------------------------------


# As data sheets have them: [FLOP/s] in bfloat16 with sparsity, and in float32; [B/s] of memory, and of links
# both ways; [bit/s] of the network
SHEETS = {
    "a100": (624e12, 19.5e12, 2.039e12, 600e9, 200e9),
    "h100": (1979e12, 67e12, 3.35e12, 900e9, 400e9),
    "h200": (1979e12, 67e12, 4.8e12, 900e9, 400e9),
    "b200": (36e15 / 8, 600e12 / 8, 7.7e12, 1800e9, 400e9),
    "b300": (36e15 / 8, 600e12 / 8, 8e12, 1800e9, 800e9),
}


@pytest.mark.parametrize("name", SHEETS)
def test_a_device_has_a_source_for_each_figure_and_a_dense_peak_for_each_dtype(name):
    device = hardware(name)
    assert {figure.source for figure in devices.figures(device).values()} <= set(devices.SOURCES)
    sparse, single, memory, linked, network = SHEETS[name]
    figures = (device.peak_bf16, device.peak_float32, device.hbm, device.nvlink, device.nic)
    assert [f.value for f in figures] == pytest.approx(
        [sparse / 2, single, memory, linked / 2, network / 8], rel=1e-3
    )
    assert {f.source for f in figures} == {"datasheet"}


def test_every_device_is_compared_with_its_sheet():
    assert {path.stem for path in devices.DEVICES.glob("*.yaml")} == set(SHEETS)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('"measured": [1]', "measured=[1]: must be an object"),
        ('"runs": 3', "runs=3: must be a list"),
        ('"measured": {"matmul": true}', "matmul=True: must be a number above 0"),
        ('"measured": {"matmul": 1e30}', "below 1e+18"),
        ('"measured": {"matmull": 1e14}', "measured.matmull: use one of matmul, experts"),
    ],
)
def test_a_calibration_that_is_none_is_refused(more, words, tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(f'{{"format": 1, "device": "h200", {more}}}')
    with pytest.raises(ConfigError) as refusal:
        read(path, device="h200")
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_calibration_replaces_what_was_measured(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(
        '{"format": 1, "device": "h200", "measured": {"matmul": 7.9e14, "experts": 5e14, "attention": 3e14, '
        '"hbm": 4e12}, "launch_s": 4e-6}'
    )
    calibration = read(path, device="h200")
    measured = hardware("h200", calibration)
    assert measured.speed("matmul") == pytest.approx(7.9e14)
    assert measured.speed("hbm") == pytest.approx(4e12)
    assert measured.launch_s.value == 4e-6
    assert calibration.width == 1.5
    assert hardware("h200").launch_s.value != 4e-6
    with pytest.raises(ConfigError, match="was measured on h200"):
        read(path, device="b300")
