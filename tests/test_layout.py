"""Who writes which piece of a checkpoint: do all ranks know without asking, and is nothing copied in vain?

Origins of the expected values: bytes counted by hand, the files on disk, the check that pieces cut up a
tensor.
"""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor as Distributed
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from tests.layouts import BASE
from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import Checkpoints, problems, transfer
from trainer.checkpoint.cover import uncovered
from trainer.checkpoint.layout import plan_of
from trainer.checkpoint.storage import read_index
from trainer.checkpoint.transfer import flat
from trainer.config import load
from trainer.run.saving import finish_saving, save


def saved(directory: Path, parallel: str) -> dict:
    """A checkpoint of a run on 4 ranks: the plan of this rank, what it staged, what it sent to rank 0."""
    run = train.build(
        load([*BASE, "micro_batch=1", f"parallel={parallel}", f"run_dir={directory}", "data.workers=0"])
    )
    sent, gather = [], dist.gather_object
    dist.gather_object = lambda own, *args, **kwargs: (
        sent.append(len(pickle.dumps(own))),
        gather(own, *args, **kwargs),
    )
    save(run)
    finish_saving(run)
    plan = plan_of(flat(run.state_dict()), num_ranks=dist.get_world_size())
    pieces = {name: planned.pieces() for name, planned in plan.items()}
    staged = run.checkpoints.staging.copies
    return {
        "plan": str(pieces),
        "shapes": {name: planned.shape for name, planned in plan.items()},
        "boxes": {name: [tuple(box)[:2] for box, _ in of_name] for name, of_name in pieces.items()},
        "staged": {key: tensor.nbytes for key, tensor in staged.items()},
        "sent": sent,
        "path": str(run.checkpoints.path(0)),
    }


@pytest.mark.parametrize(
    "parallel", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "hsdp")), "hsdp_ep"]
)
def test_a_rank_copies_what_it_writes_and_all_agree_without_asking(tmp_path, parallel: str) -> None:
    ranks = run_ranks(saved, 4, tmp_path, parallel)
    path = Path(ranks[0]["path"])
    assert problems(path) == []
    assert all(rank["plan"] == ranks[0]["plan"] for rank in ranks)
    for name, boxes in ranks[0]["boxes"].items():
        assert uncovered(ranks[0]["shapes"][name], boxes) is None, name
    for number, rank in enumerate(ranks):
        with safe_open(path / f"rank-{number:05d}.safetensors", framework="pt") as file:
            written = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118  # it is no dict
        assert written == rank["staged"]
        assert len(rank["sent"]) == 1 and rank["sent"][0] < 500  # [bytes] a name, a size, a hash
    sizes = [sum(rank["staged"].values()) for rank in ranks]
    largest = max(size for rank in ranks for size in rank["staged"].values())
    assert max(sizes) - min(sizes) <= 2 * largest, sizes
    whole = {name: stored for name, stored in read_index(path).items() if stored.pieces}
    held = sum(torch.Size(stored.shape).numel() * stored.dtype.itemsize for stored in whole.values())
    assert sum(sizes) == held  # each element once, however many ranks hold it


def test_ranks_of_sibling_meshes_hold_one_tensor_and_one_mesh_writes_it(tmp_path) -> None:
    """Ranks 0 and 1, and ranks 2 and 3, hold the same tensor: whole, or each pair cut in two."""

    def planned() -> list:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "in_pair"))["in_pair"]
        whole = torch.arange(10.0).view(5, 2)
        state = {
            "cut": distribute_tensor(whole, mesh, [Shard(0)]),
            "same": distribute_tensor(whole, mesh, [Replicate()]),
            "plain": whole,
            "after": distribute_tensor(whole, mesh, [Replicate()]),
        }
        Checkpoints(tmp_path).save(1, state, wait=True)
        found = {name: tensor * 0 for name, tensor in state.items()}
        loaded = Checkpoints(tmp_path).load(1, found)
        back = [x.full_tensor() if isinstance(x, Distributed) else x for x in loaded.values()]
        assert all(torch.equal(tensor, whole) for tensor in back)
        own = {name: of.piece_of(dist.get_rank()) for name, of in plan_of(state, num_ranks=4).items()}
        return sorted(name for name, box in own.items() if box is not None)

    writers = run_ranks(planned, 4)
    assert problems(tmp_path / "step-00000001") == []
    assert [name for names in writers for name in names if name == "cut"] == ["cut"] * 2
    for name in ("same", "plain", "after"):
        assert sum(name in names for names in writers) == 1, (name, writers)
    assert not any(set(names) & {"cut", "same", "after"} for names in writers[2:])
    index = json.loads((tmp_path / "step-00000001" / "index.json").read_text())
    assert [piece["sizes"] for piece in index["cut"]["pieces"]] == [[3, 2], [2, 2]]


def test_a_rank_that_cannot_read_its_part_fails_all_of_them(tmp_path, monkeypatch) -> None:
    def loaded() -> str:
        mesh = init_device_mesh("cpu", (2,))
        state = {"w": distribute_tensor(torch.arange(8.0), mesh, [Shard(0)])}
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(1, state, wait=True)
        if dist.get_rank() == 1:
            transfer.SafetensorsReader.read_data = lambda *args: (_ for _ in ()).throw(OSError("no disk"))
        try:
            checkpoints.load(1, state)
        except transfer.DamagedError as error:
            return str(error)
        return "loaded"

    message = f"{tmp_path}/step-00000001 cannot be read: rank 1: OSError: no disk"
    assert run_ranks(loaded, 2) == [message, message]


def test_what_is_not_summed_yet_is_no_state(tmp_path) -> None:
    def refused() -> str:
        mesh = init_device_mesh("cpu", (1,))
        half = Distributed.from_local(torch.ones(2), mesh, [Partial()])
        with pytest.raises(TypeError, match="is not summed yet"):
            plan_of({"half": half}, num_ranks=1)
        return "refused"

    assert run_ranks(refused, 1) == ["refused"]
