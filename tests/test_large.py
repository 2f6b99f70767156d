"""The full Trinity Large on a fake mesh of 2,048 ranks: every shard has the bytes that arithmetic says.
Where are experts cut that HSDP has more ranks than?
"""

import pytest
import torch
import torch.distributed as dist

from tests.ranks import free_port  # noqa: F401  # heavy imports before the fork
from trainer.config import ParallelConfig, load
from trainer.model.afmoe import afmoe_config, moe_layers
from trainer.model.parallelize import build_parallel
from trainer.optim import muon
from trainer.ranks import device
from trainer.ranks.local import local


def test_large_on_2048_ranks(tmp_path):
    torch.multiprocessing.start_processes(build_large, args=(tmp_path,), nprocs=1, start_method="fork")
    got = torch.load(tmp_path / "bytes")
    # 54 MoE layers x 256 experts x 3 matrices of 3072 x 3072, over dp_shard 128 = efsdp 16 x ep 8: 2 experts
    # a rank
    assert got["experts"] == 54 * 2 * 3 * 3072 * 3072 * 4
    # everything else is cut along rows over 128 ranks; rank 0 holds the larger part where 128 does not divide
    dim, heads = 3072, 48 * 128
    per_layer = [heads * dim] * 2 + [8 * 128 * dim] * 2 + [dim * heads] + [dim] * 4 + [128] * 2
    dense = [12288 * dim] * 3
    moe = [3072 * dim] * 3 + [256 * dim]
    whole = 60 * per_layer + 6 * dense + 54 * moe + [200_192 * dim] * 2 + [dim]
    assert all(size % 128 == 0 for size in whole)
    assert got["other"] == sum(whole) // 128 * 4
    assert got["placements"] == {"experts": "dp_replicate,efsdp,ep", "wq": "dp_replicate,fsdp"}
    assert got["local_expert_shape"] == (2, 3072, 3072)
    others, experts = got["plans"]
    # 54 layers x 3 x this rank's 2 experts, shared out among the 16 replicas
    assert (experts["owners"], experts["places"], experts["items"]) == (16, 1, 54 * 3 * 2)
    assert sorted(set(experts["owned"])) == [20, 21]  # 324 / 16 = 20.25
    # everything else but embedding and head: 5 of attention, 3 of a dense or shared FFN; routers. One owner
    # of 2,048 each
    assert (others["owners"], others["places"], others["items"]) == (2048, 128, 60 * 8 + 54)
    assert sorted(set(others["owned"])) == [0, 1]
    assert set(others["owned_by_replica"]) == {33, 34}  # 534 / 16


def build_large(rank, directory):
    dist.init_process_group("fake", rank=0, world_size=2048)
    config = load(
        ["name=large", "model=large", "steps=1", "seq_len=8192", "global_batch=12288", "micro_batch=1"]
    )
    dims = device.build_mesh(ParallelConfig(dp_replicate=16, dp_shard=128, ep=8), num_experts=256)
    model = build_parallel(afmoe_config(config.model, flex=False), dims, dtype=torch.bfloat16)
    sizes = {name: local(p).numel() * p.element_size() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    expert = parameters["layers.10.moe.routed_experts.inner_experts.w1_EFD"]
    query = parameters["layers.10.attention.qkv_linear.wq.weight"]
    experts = sum(size for name, size in sizes.items() if "inner_experts" in name)
    names = {"experts": expert, "wq": query}
    hyper = {
        "lr": 1e-3,
        "adamw_lr": 1e-3,
        "momentum": 0.95,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    plans = sorted(muon(model, **hyper, dtype="bfloat16")[0].plans, key=lambda plan: -plan.num_cuts)
    torch.save(
        {
            "experts": experts,
            "other": sum(sizes.values()) - experts,
            "local_expert_shape": tuple(local(expert).shape),
            "plans": [described(plan) for plan in plans],
            "placements": {key: ",".join(p.device_mesh.mesh_dim_names) for key, p in names.items()},
        },
        directory / "bytes",
    )


def described(plan) -> dict:
    """How many matrices each of the owners has, over all rounds."""
    owned = [sum(len(items[owner]) for items in plan.rounds) for owner in range(len(plan.rounds[0]))]
    whole = [item for items in plan.rounds for own in items for item in own]
    assert len({(id(item.parameter), item.index) for item in whole}) == len(whole)  # each matrix once
    by_replica = [sum(owned[r * plan.num_cuts : (r + 1) * plan.num_cuts]) for r in range(plan.num_replicas)]
    return {
        "owners": len(owned),
        "places": plan.num_cuts,
        "items": len(whole),
        "owned": owned,
        "owned_by_replica": by_replica,
    }


@pytest.mark.parametrize(
    ("num_experts", "shape"),
    [
        (4, [1, 64, 128]),
        (6, [2, 64, 128]),  # 2, 2, 2 and none
        (2, [2, 16, 128]),  # more shards than experts: a quarter of the rows of both
    ],
)
def test_replicas_do_not_cut_experts(tmp_path, num_experts, shape):
    """Of 64 x 128, without EP, on two replicas of four shards."""
    torch.multiprocessing.start_processes(
        build_replicas, args=(tmp_path, num_experts), nprocs=1, start_method="fork"
    )
    got = torch.load(tmp_path / "shape")
    assert got["num_experts"] == num_experts
    assert got["placements"] == "dp_replicate,fsdp"
    assert list(got["shape"]) == shape


def build_replicas(rank, directory, num_experts):
    dist.init_process_group("fake", rank=0, world_size=8)
    config = load(["experiment=demo", f"model.num_experts={num_experts}", "model.top_k=1"])
    dims = device.build_mesh(ParallelConfig(dp_replicate=2, dp_shard=4), num_experts=num_experts)
    model = build_parallel(afmoe_config(config.model, flex=False), dims, dtype=torch.float32)
    [experts, *_] = [layer.routed_experts.inner_experts for layer in moe_layers(model)]
    about = {"shape": local(experts.w1_EFD).shape, "num_experts": experts.num_experts}
    torch.save(
        about | {"placements": ",".join(experts.w1_EFD.device_mesh.mesh_dim_names)}, directory / "shape"
    )
