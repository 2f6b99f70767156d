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
# With context parallelism the ranks of a row stand beside these; one row a step leaves room for no other.
LAYOUTS = [(1, ["parallel=single"])]


def train_worker(overrides: list[str]) -> int:
    return train.train(train.load(overrides))


@pytest.mark.parametrize(("num_ranks", "layout"), LAYOUTS)
def test_the_demo_extends_and_asks_before_and_after(
    tmp_path: Path, num_ranks: int, layout: list[str]
) -> None:
    run_ranks(train_worker, num_ranks, [*SHORT, *layout, f"run_dir={tmp_path}"])
    lines = metrics(tmp_path / "extension_demo")
    assert [line["tokens"] for line in lines] == [512 * n for n in range(1, 5)] + [
        2048 + 256 * n for n in range(1, 5)
    ]
    # documents of the pretraining that are open are read to their ends first
    assert lines[3]["data/not_drawn"] == 0 < lines[-1]["data/not_drawn"]
    text = (tmp_path / "extension_demo" / "evaluations.jsonl").read_text()
    results = [json.loads(line) for line in text.splitlines()]
    assert [(result["step"], result["evaluation"]) for result in results] == [
        (step, name) for step in (4, 8) for name in ("long", "needles")
    ]
    asked = {(row["length"], row["depth"]) for row in results[1]["needles"]}
    assert asked == {(length, depth) for length in (96, 256) for depth in (0, 25, 50, 75, 100)}
    assert results[0]["targets"] == results[2]["targets"] > 0
