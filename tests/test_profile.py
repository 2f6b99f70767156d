"""What is done between steps: the profiler writes what it is asked for, and nothing else; garbage is
collected after the same steps on all ranks.

Origins of the expected values: the operators that a step must call, the files on disk, gc's own counts.
"""

import gc
import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from trainer.config import ConfigError, load
from trainer.run.build import build
from trainer.run.garbage import EVERY, Garbage
from trainer.run.profile import Profile
from trainer.train import train

RUN = ["experiment=synthetic", "seq_len=32", "micro_batch=1", "name=watched", "data.workers=0"]


SMALL = [
    "parallel=fsdp",
    "micro_batch=1",
    "model.num_layers=2",
    "model.num_dense_layers=1",
    "model.global_every=2",
]


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


@pytest.mark.slow
def test_the_steps_that_were_named_are_in_the_trace_and_no_others(tmp_path):
    def run() -> None:
        train(load([*RUN, f"run_dir={tmp_path}", "steps=4", "profile.steps=[2,3]", *SMALL]))

    run_ranks(run, 2)
    directory = tmp_path / "watched" / "profile"
    assert names_in(directory) == ["steps-00002-00003.rank0.json", "steps-00002-00003.rank0.txt"]
    events = json.loads((directory / "steps-00002-00003.rank0.json").read_text())["traceEvents"]
    heads = [event for event in events if event.get("name") == "aten::embedding"]
    assert len(heads) == 2 * 4  # one a microbatch: 8 rows, a rank has 4, micro_batch 1
    assert "aten::mm" in (directory / "steps-00002-00003.rank0.txt").read_text()


def test_a_rank_that_is_not_there_cannot_be_watched(tmp_path):
    with pytest.raises(ConfigError, match=r"profile\.rank=1: the last of the ranks is 0; use at most that"):
        build(load([*RUN, f"run_dir={tmp_path}", "steps=5", "profile.steps=[2,3]", "profile.rank=1"]))


class Counted(Profile):
    """Which steps were watched, without a profiler."""

    def _start(self) -> None:
        self.running, self.watched = True, []

    def _stop(self, running) -> None:
        self.running = None
        self.done = list(self.watched)

    def begin(self, step: int) -> None:
        super().begin(step)
        if self.running:
            self.watched.append(step)


@pytest.mark.parametrize(
    ("begins", "ends", "watched"), [(1, 9, [3, 4]), (4, 9, [4]), (1, 3, [3]), (5, 9, None), (1, 2, None)]
)
def test_a_run_that_begins_or_ends_between_them_is_watched_there(tmp_path, begins, ends, watched):
    profile = Counted(tmp_path, first=3, last=4, rank=0, device=torch.device("cpu"))
    with profile:
        for step in range(begins, ends + 1):
            profile.begin(step)
    assert getattr(profile, "done", None) == watched


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where a directory must be")
    with Profile(tmp_path, first=1, last=1, rank=0, device=torch.device("cpu")) as profile:
        profile.begin(1)
        torch.ones(3).sum()
        profile.begin(2)
    assert "the profile cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[3]", r"profile\.steps=\[3\]: must be \[first step, last step\]"),
        ("[0,2]", "the first one at least 1"),
        ("[5,4]", "not behind the last"),
        ("[1,21]", r"must be at most 20 steps \(a trace takes 5 MB a step and more\)"),
    ],
)
def test_other_steps_are_refused_with_what_they_must_be(steps: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load([*RUN, "steps=30", f"profile.steps={steps}"])


def test_garbage_waits_for_its_step_and_all_is_as_before_afterwards():
    was, frozen = gc.isenabled(), gc.get_freeze_count()
    collected = []
    gc.callbacks.append(note := lambda phase, info: collected.append(info["generation"]))
    try:
        with Garbage() as garbage:
            assert not gc.isenabled() and gc.get_freeze_count() > frozen
            collected.clear()
            for step in range(1, 2 * EVERY + 1):
                kept = [[] for _ in range(1000)]  # more than the collector's threshold
                garbage.begin(step)
            assert collected == [2, 2] * 2 and kept  # start and stop, of everything, after EVERY steps each
    finally:
        gc.callbacks.remove(note)
    assert (gc.isenabled(), gc.get_freeze_count()) == (was, 0)
