"""What a run is made of: the groups of its ranks, its state, the sums of a step."""

import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tests.runs import BASE
from trainer import train
from trainer.config import load
from trainer.run.state import PARTS, Groups
from trainer.run.step import StepSums

NUM_RANKS, PER_ROW = 4, 2  # as with context parallelism 2: ranks 0 and 1 share their rows, and so do 2 and 3


def groups_of_rows() -> Groups:
    """Ranks 0 and 2 read other documents, and so do 1 and 3. All four hold other tokens."""
    documents = [dist.new_group(range(first, NUM_RANKS, PER_ROW)) for first in range(PER_ROW)]
    return Groups(documents=documents[dist.get_rank() % PER_ROW], tokens=dist.group.WORLD)


def test_what_the_ranks_of_a_row_read_together_is_counted_once():
    """With one group for both questions, documents and waits would be counted once for each rank of a row."""

    def counted() -> tuple[list[float], list[float], float, int]:
        run = train.build(load([*BASE, "name=rows", "parallel=fsdp", "data.source_loss=false"]))
        run.groups = groups_of_rows()
        run.stream.totals.update({"documents": 10 + dist.get_rank() // PER_ROW, "tokens": 100})
        read = run.documents_read()
        state = run.state_dict(["stream"])["stream"]["counts"]
        assert state.tolist() == list(read.values())
        once = float(run.groups.is_first_of_row)
        sums = StepSums(
            squared_norm=torch.tensor(1.0),
            stop=torch.tensor([False, False]),
            unread=torch.tensor(False),
            waited_s=torch.tensor(3.0 * once),
            tokens=torch.tensor(5 * once),
            flop=torch.tensor(1e9),
            counts=torch.tensor(run.stream.state_counts, dtype=torch.float64) * once,
            loss_2S=torch.zeros(2, 0),
            loss_2U=torch.zeros(2, run.groups.num_readers),
        ).all_reduce(run.groups.tokens)
        return list(read.values()), sums.counts.tolist(), sums.waited_s.item(), run.groups.reader

    results = run_ranks(counted, NUM_RANKS)
    for read, in_step, waited_s, _ in results:
        assert read == in_step and read[:2] == [10 + 11, 200]  # two readers, whatever the number of ranks
        assert waited_s == 6.0
    assert [reader for *_, reader in results] == [0, 0, 1, 1]


def test_the_sums_of_a_step_come_back_in_the_fields_they_were_packed_from():
    def shares(rank: int) -> StepSums:
        generator = torch.Generator().manual_seed(rank)

        def draw(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        return StepSums(
            squared_norm=draw(),
            stop=torch.tensor([rank == 1, False]),
            unread=torch.tensor(rank == 0),
            waited_s=draw(),
            tokens=draw(),
            flop=draw(),
            counts=draw(7),
            loss_2S=draw(2, 3),
            loss_2U=draw(2, 5),
        )

    def reduced() -> dict[str, torch.Tensor]:
        return vars(shares(dist.get_rank()).all_reduce(dist.group.WORLD))

    first, second = vars(shares(0)), vars(shares(1))
    for sums in run_ranks(reduced, 2):
        assert sums.keys() == first.keys()
        for name, value in sums.items():
            assert torch.equal(value, first[name].double() + second[name].double()), name


def test_each_part_of_a_run_is_taken_and_given_back_alone(tmp_path):
    """Another run with another seed takes one part: exactly that part is then the first run's."""

    def taken() -> dict[str, set[str]]:
        settings = [*BASE, f"run_dir={tmp_path}", "data.workers=0"]
        first = train.build(load([*settings, "name=first"]))
        for _ in range(2):
            train.train_step(first, train.next_batches(first))
        changed = {}
        for part in PARTS:
            other = train.build(load([*settings, "name=other", "seed=1"]))
            train.train_step(other, train.next_batches(other))
            before = flat(other.state_dict())
            other.load_state_dict(first.state_dict([part]))
            after, wanted = flat(other.state_dict()), flat(first.state_dict([part]))
            assert all(torch.equal(after[name], value) for name, value in wanted.items())
            changed[part] = {n.split(".")[0] for n in after if not torch.equal(after[n], before[n])}
        return changed

    changed = run_ranks(taken, 1)[0]
    assert changed.pop("health") == set()  # nothing was skipped in either run
    assert changed.pop("tokens") == {
        "tokens",
        "balancer",
    }  # the run ends elsewhere: so does the verdict's tail
    assert changed == {part: {part} for part in changed}


def flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    leaves = {}
    for name, value in state.items():
        if isinstance(value, dict):
            leaves |= flat(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value.detach().clone()
    return leaves
