"""Does a run extend its context, with long rows of long documents, streams in turns, and needles asked for
before and after?

Origins of the expected values: the program by hand; one rank, for other layouts.
"""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import metrics
from trainer import train

# `experiment=extension_demo` with fewer steps and shorter rows.
SHORT = [
    "experiment=extension_demo",
    "model.dim=32",
    "seq_len=64",
    "stage.warmup.steps=1",
    "stage.pretraining.steps=2",
    "stage.decay.steps=1",
    "stage.extension_warmup.steps=1",
    "stage.extension_warmup.seq_len=256",
    "stage.extension.steps=3",
    "data.sources.long.length=256",
    "data.sources.short.num_documents=1000",
    "data.sources.long.num_documents=1000",
    "evaluate.needles.interval=4",
    "evaluate.needles.lengths=[96, 256]",
    "evaluate.needles.samples=1",
]


def train_worker(overrides: list[str]) -> int:
    return train.train(train.load(overrides))


def evaluations(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "evaluations.jsonl").read_text().splitlines()]


def test_the_demo_extends_and_asks_before_and_after(tmp_path: Path) -> None:
    run_ranks(train_worker, 1, [*SHORT, f"run_dir={tmp_path}"])
    lines = metrics(tmp_path / "extension_demo")
    assert [line["tokens"] for line in lines] == [512 * n for n in range(1, 5)] + [
        2048 + 256 * n for n in range(1, 5)
    ]
    assert not any(line.get("data/truncated") for line in lines)  # every answer lies behind its needle
    results = evaluations(tmp_path / "extension_demo")
    assert [result["step"] for result in results] == [4, 8]
    for result in results:
        asked = {(row["length"], row["depth"]) for row in result["needles"]}
        assert asked == {(length, depth) for length in (96, 256) for depth in (0, 25, 50, 75, 100)}


@pytest.mark.rare
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_that_share_its_rows_extend_as_one_does(tmp_path: Path, cp: int) -> None:
    """Losses, 1e-5 relative; and as many needles."""
    for ranks in (1, cp):
        run_ranks(
            train_worker, ranks, [*SHORT, f"parallel.cp={ranks}", f"run_dir={tmp_path}", f"name={ranks}"]
        )
    one, several = tmp_path / "1", tmp_path / str(cp)
    losses = [[line["loss"] for line in metrics(directory)] for directory in (one, several)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 8
    shares = [[result["needles"] for result in evaluations(directory)] for directory in (one, several)]
    assert shares[1] == shares[0] and len(shares[0]) == 2
