"""The plan of a run: what small traces add up to is what the whole model does, on ranks that are not there
and on ranks that are.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.fake import in_a_process
from tests.ranks import run_ranks
from trainer.config import ConfigError, ParallelConfig, load
from trainer.lab.plan import hardware as devices
from trainer.lab.plan.__main__ import main
from trainer.lab.plan.calibration import Calibration, read
from trainer.lab.plan.hardware import hardware
from trainer.lab.plan.keys import Keys
from trainer.lab.plan.layout import Layout, Traffic, memory, sent_on, traffic
from trainer.lab.plan.plan import plan, refuse_unfit
from trainer.lab.plan.search import micro_batches
from trainer.lab.plan.table import warnings
from trainer.lab.plan.optimizer import OptimizerStep, OptimizerSteps
from trainer.lab.plan.trace import traced
from trainer.lab.plan.watch import Sent, Watch
from trainer.lab.plan.whole import Traces
from trainer.model.afmoe import afmoe_config, flops_per_token
from trainer.model.parallelize import build_parallel, reduce_over_replicas
from trainer.program import program_of
from trainer.ranks import device

# replicate, shard, ep: FSDP; HSDP x EP; experts cut inside their matrices with EP, and, as replicas count, without
LAYOUTS = [(1, 4, 1), (2, 4, 2), (1, 16, 2), (4, 4, 1)]
POLICIES = ["none", "selective", "full"]
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


def compare(policy, layouts, overrides):
    config = config_of("model.num_layers=4", *overrides)
    traces, rows = Traces(config), []
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
                "after": whole.after,
            }
        )
    return rows


@pytest.mark.parametrize(
    "policy", [pytest.param(p, marks=[] if p == "selective" else [pytest.mark.slow]) for p in POLICIES]
)
def test_small_traces_add_up_to_the_whole(policy, tmp_path):
    for row in in_a_process(compare, tmp_path, policy, LAYOUTS, []):
        flop, whole_flop = row["flop"]
        assert flop == pytest.approx(whole_flop, rel=1e-12), row["degrees"]
        sent, whole_sent = row["sent"]
        assert sent == pytest.approx(whole_sent, rel=1e-12), row["degrees"]
        assert row["peak"][0] == pytest.approx(row["peak"][1], rel=0.01), row["degrees"]


# -- against ranks that are there ------------------------------------------------------------------------


def sent_by_ranks(degrees, accumulation):
    """What a rank of a real run hands to its collectives in a step's microbatches."""
    replicate, shard, ep = degrees
    config = config_of("seq_len=62", "global_batch=12")
    torch.manual_seed(dist.get_rank())
    layout = ParallelConfig(dp_replicate=replicate, dp_shard=shard, ep=ep)
    dims = device.build_mesh(layout, num_experts=config.model.num_experts)
    net = build_parallel(afmoe_config(config.model, flex=False), dims, dtype=torch.bfloat16)
    net.to_empty(device="cpu")
    for p in net.parameters():
        torch.nn.init.normal_(p.to_local(), std=0.02)
    for module in net.modules():
        if hasattr(module, "_init_self_buffers"):
            module._init_self_buffers(buffer_device=torch.device("cpu"))
    watch = Watch(device_type="none")
    rows = torch.randint(config.model.vocab_size, (1, 62))
    positions = torch.arange(62)[None]
    with watch:
        for i in range(accumulation):
            with watch.during("forward"):
                loss = net(rows, positions, rows, None)
            reduce_over_replicas(net, now=i == accumulation - 1)  # as run/step.backward does
            with watch.during("backward"):
                loss.backward()
    return sums(watch.sent)


def planned_bytes(degrees_of_all):
    config = config_of("seq_len=62", "global_batch=12")
    traces = Traces(config)
    planned = []
    for replicate, shard, ep in degrees_of_all:
        layout = Layout(replicate * shard, replicate, ep, 1, "none")
        planned.append(sums(sent_on(layout, traces.whole(layout.variant(8)), tokens=62)))
    return planned


FOUR = [(1, 4, 1), (2, 2, 1), (1, 4, 2), (2, 2, 2)]  # FSDP, HSDP, EP, HSDP x EP


def test_four_ranks_send_what_was_planned(tmp_path):
    planned = in_a_process(planned_bytes, tmp_path, FOUR)
    for degrees, expected in zip(FOUR, planned, strict=True):
        for accumulation in (1, 3):
            ranks = run_ranks(sent_by_ranks, 4, degrees, accumulation)
            mean = Counter()
            for of_rank in ranks:  # a rank sends on as many rows as reached its experts: the mean is even
                for key, size in of_rank.items():
                    mean[key] += size / 4 / (1 if key[1] == "all-reduce" else accumulation)
            assert expected == pytest.approx(dict(mean), rel=1e-12), (degrees, accumulation)


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
    results = []
    for cp in (1, 2, 4):
        words = [*overrides, f"parallel.cp={cp}", f"parallel.dp_shard={4 // cp}"]
        planned = plan(config_of(*words), hardware("h200"), Calibration("h200"), searches=False)
        step = planned.main.step
        results.append((step.memory.kinds["activations"], step.flop, step.accumulation, planned.layout.ranks))
    return results


def test_ranks_that_share_rows_have_a_part_of_the_activations_and_all_of_the_work(tmp_path):
    """The work of a step is that of whole rows, in as many more microbatches."""
    whole, two, four = in_a_process(cut_or_whole, tmp_path, ["seq_len=4096", "global_batch=8"])
    assert [one[2:] for one in (whole, two, four)] == [(2, 4), (4, 4), (8, 4)]
    for other in (two, four):
        assert other[1] == pytest.approx(whole[1], rel=1e-9)
    assert 0.2 < four[0] / whole[0] < 0.4 < two[0] / whole[0] < 0.7


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


@pytest.mark.slow
def test_a_model_that_never_fits_is_refused(tmp_path):
    said = in_a_process(refused_as_never_fitting, tmp_path, ["model=debug", *SETTINGS, "parallel=fsdp"])
    assert "no layout on 4 ranks fits" in said and "GiB" in said and "more ranks=" in said


# -- devices and calibration -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a100", "b200", "b300", "h100", "h200"])
def test_every_figure_has_a_source(name):
    assert {figure.source for figure in devices.figures(hardware(name)).values()} <= set(devices.SOURCES)


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
