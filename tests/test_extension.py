"""Does a run extend its context, with long rows of long documents, streams in turns, and the questions about
long rows asked before and after?

Origins of the expected values: the program by hand; one rank, for other layouts.
"""

import json
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.runs import metrics
from trainer import train

# `experiment=extension_demo` with a smaller model, fewer steps and shorter rows.
SHORT = [
    "experiment=extension_demo",
    "model=debug",
    "seq_len=32",
    "stage.warmup.steps=1",
    "stage.pretraining.steps=3",
    "stage.extension_warmup.steps=1",
    "stage.extension_warmup.seq_len=256",
    "stage.extension.steps=3",
    "data.length_bias.long={short: 64, long: 512}",
    "evaluate.long.interval=4",
    "evaluate.long.tokens=512",
    "evaluate.long.seq_len=256",
    "evaluate.needles.interval=4",
    "evaluate.needles.lengths=[96, 256]",
    "evaluate.needles.samples=1",
    "evaluate.needles.keys=1",
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
    # documents of the pretraining that are open are read to their ends first, and last longer than this run
    assert lines[-1]["data/not_drawn"] == 0
    results = evaluations(tmp_path / "extension_demo")
    assert [(result["step"], result["evaluation"]) for result in results] == [
        (step, name) for step in (4, 8) for name in ("long", "needles")
    ]
    asked = {(row["length"], row["depth"]) for row in results[1]["needles"]}
    assert asked == {(length, depth) for length in (96, 256) for depth in (0, 25, 50, 75, 100)}
    assert results[0]["targets"] == results[2]["targets"] > 0


@pytest.mark.rare
@pytest.mark.parametrize("cp", [2, 4])
def test_ranks_that_share_its_rows_extend_as_one_does(tmp_path: Path, cp: int) -> None:
    """Losses of training and of evaluations, 1e-5 relative."""
    for ranks in (1, cp):
        run_ranks(
            train_worker, ranks, [*SHORT, f"parallel.cp={ranks}", f"run_dir={tmp_path}", f"name={ranks}"]
        )
    one, several = tmp_path / "1", tmp_path / str(cp)
    losses = [[line["loss"] for line in metrics(directory)] for directory in (one, several)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 8
    asked = [
        [line["loss"] for line in evaluations(d) if line["evaluation"] == "long"] for d in (one, several)
    ]
    assert asked[1] == pytest.approx(asked[0], rel=1e-5) and len(asked[0]) == 2
