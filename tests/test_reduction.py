"""How often do gradients cross the network, and in which dtype?

Origins of the expected values: the sizes of the shards, by hand; the same run in one microbatch; one rank.
"""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist

from tests.layouts import BASE, batches, full
from tests.ranks import run_ranks
from trainer import train
from trainer.config import ConfigError, load
from trainer.data import Batch
from trainer.ranks.local import local

ROWS = 3  # of a rank: one microbatch of 3 rows, or 3 of one
STEPS = 2


def rows_of(step: int, num_ranks: int) -> list[torch.Tensor]:
    whole = [torch.cat(planes) for planes in zip(batches(step), batches(step + 100), strict=True)]
    return [plane[: ROWS * num_ranks] for plane in whole]


def trained(overrides: list[str]) -> dict:
    """Losses and weights of STEPS steps, and what each of them sent: [bytes] by collective, of the
    gradient.
    """
    sent, of_step = {}, []

    def counting(name: str, tensor_of):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            tensor = tensor_of(*args, **kwargs)
            if tensor.dtype in (torch.float32, torch.bfloat16):  # counts are int64, sums of the step float64
                sent[name] = sent.get(name, 0) + tensor.nbytes
            return original(*args, **kwargs)

        setattr(dist, name, call)

    num_ranks = dist.get_world_size()
    run = train.build(load([*BASE, f"global_batch={ROWS * num_ranks}", *overrides]))
    counting("all_reduce", lambda tensor, *args, **kwargs: tensor)
    counting("reduce_scatter_single", lambda output, input, *args, **kwargs: input)
    counting("all_gather_single", lambda output, input, *args, **kwargs: output)
    metrics, mine = [], slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)
    for step in range(STEPS):
        sent.clear()
        planes = [plane[mine].split(run.config.micro_batch) for plane in rows_of(step, num_ranks)]
        metrics.append(train.train_step(run, [Batch(*parts) for parts in zip(*planes, strict=True)]))
        of_step.append(dict(sent))
    shards = sum(local(parameter).nbytes for parameter in run.model.parameters())
    return {
        "sent": of_step,
        "shards": shards,
        "losses": [step["loss"] for step in metrics],
        "weights": {name: full(parameter) for name, parameter in run.model.named_parameters()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [pytest.param("hsdp", marks=pytest.mark.rare), "hsdp_ep"])
def test_replicas_are_summed_once_a_step_however_many_microbatches_it_has(parallel: str) -> None:
    whole, cut = (
        run_ranks(trained, 4, [f"parallel={parallel}", f"micro_batch={rows}"]) for rows in (ROWS, 1)
    )
    for one, three in zip(whole, cut, strict=True):
        for before, after in zip(one["sent"], three["sent"], strict=True):
            # every shard once: each matrix of this model is cut without padding
            assert after["all_reduce"] == before["all_reduce"] == one["shards"]
            # within a replica gradients are cut up in every microbatch: nobody has room for the whole one
            assert after["reduce_scatter_single"] == 3 * before["reduce_scatter_single"]
        assert three["losses"] == pytest.approx(one["losses"], rel=1e-6)
        for name, weight in one["weights"].items():  # after an AdamW step, which enlarges what is near 0
            assert (three["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_weights_that_are_kept_for_the_backward_are_gathered_once() -> None:
    again, kept = (
        run_ranks(
            trained, 2, ["parallel=fsdp", "micro_batch=3", f"parallel.reshard_after_forward={reshard}"]
        )[0]
        for reshard in ("true", "false")
    )
    assert kept["losses"] == again["losses"]  # the same numbers, gathered less often
    assert all(torch.equal(kept["weights"][name], weight) for name, weight in again["weights"].items())
    whole = sum(weight.nbytes for weight in again["weights"].values())
    for often, once in zip(again["sent"], kept["sent"], strict=True):
        assert once["all_gather_single"] == whole
        # all but final norm and head, which FSDP keeps as their backward comes at once, and the embedding,
        # whose backward needs no weight
        names = ("norm.weight", "lm_head.weight", "tok_embeddings.weight")
        not_again = sum(again["weights"][name].nbytes for name in names)
        assert often["all_gather_single"] == 2 * whole - not_again


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", pytest.param("hsdp_ep", marks=pytest.mark.rare)])
def test_gradients_may_be_reduced_in_bfloat16(parallel: str) -> None:
    single = run_ranks(trained, 4, [f"parallel={parallel}", "micro_batch=1"])[0]
    half = run_ranks(trained, 4, [f"parallel={parallel}", "micro_batch=1", "parallel.reduce_dtype=bfloat16"])[
        0
    ]
    for wide, narrow in zip(single["sent"], half["sent"], strict=True):
        assert 2 * narrow["reduce_scatter_single"] == wide["reduce_scatter_single"]
        assert 2 * narrow.get("all_reduce", 0) == wide.get("all_reduce", 0)
    assert half["losses"][0] == single["losses"][0]  # before the first update
    assert half["losses"] == pytest.approx(single["losses"], rel=1e-3)  # 8 bits of a gradient
    moved = [not torch.equal(half["weights"][name], weight) for name, weight in single["weights"].items()]
    assert any(moved)
    assert all(weight.dtype == torch.float32 for weight in half["weights"].values())


def test_another_dtype_of_the_reduction_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.reduce_dtype=float16: must be one of float32, bfloat16"
    ):
        load([*BASE, "micro_batch=1", "parallel.reduce_dtype=float16"])


def test_the_origins_differ() -> None:
    """Rows of two steps are not the same ones: a step that was trained twice would be seen."""
    first, second = (rows_of(step, 4)[0] for step in range(STEPS))
    assert all(not torch.equal(a, b) for a, b in pairwise([first, second]))
