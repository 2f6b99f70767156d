"""Does the code of docs/library.md run as it stands, and does its loop train as `trainer.train` does?

The page's own blocks are executed on one rank, with a tiny model put behind their overrides. Expected losses
are those of `trainer.train` with the same settings.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import trainer
from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import read_whole
from trainer.config import load
from trainer.ranks.lock import lock

ROOT = Path(__file__).parent.parent
LOOP, PARTS, USE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
TINY = [
    "model=debug",
    "model.vocab_size=256",
    "seq_len=32",
    "global_batch=4",
    "micro_batch=2",
    "steps=6",
    "checkpoint.interval=4",
    "data=synthetic",
    "data.buffer=0",
]


def executed(code: str, directory: Path, *, patch: Callable[[], None] = lambda: None) -> list[tuple]:
    """Runs a block of the page, with TINY behind its overrides. Returns what it printed, and `code` last."""
    printed: list[tuple] = []
    trainer.load = lambda overrides: load([*overrides, *TINY, f"run_dir={directory}"])
    patch()
    names = {"print": lambda *values: printed.append(values)}
    exec(compile(code, "docs/library.md", "exec"), names)
    return [*printed, (names["code"],)]


def trained(name: str, directory: Path) -> int:
    return train.train(load(["experiment=demo", *TINY, f"run_dir={directory}", f"name={name}"]))


def test_the_loop_of_the_page_trains_as_the_trainer_does(tmp_path):
    """Losses, exit code and every tensor of the last checkpoint, bit for bit."""
    (told,) = run_ranks(executed, 1, LOOP, tmp_path)
    assert run_ranks(trained, 1, "theirs", tmp_path) == [told[-1][0]] and told[-1] == (0,)
    lines = (tmp_path / "theirs/metrics.jsonl").read_text().splitlines()
    assert told[:-1] == [(line["step"], line["loss"]) for line in map(json.loads, lines)]
    steps = [sorted(path.name for path in (tmp_path / name / "checkpoints").glob("step-*")) for name in NAMES]
    assert steps[0] == steps[1] == ["step-00000004", "step-00000006"]
    ours, theirs = (read_whole(tmp_path / name / "checkpoints/step-00000006") for name in NAMES)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


NAMES = ("mine", "theirs")


@pytest.mark.slow
def test_the_loop_of_the_page_goes_on_where_it_stopped(tmp_path):
    """Stopped as by a signal after step 2; the two parts are the whole."""

    def stop() -> None:
        step = trainer.train_step

        def stopping(run, batches):
            values = step(run, batches)
            run.stop.agreed = 75 if run.step == 2 else None
            return values

        trainer.train_step = stopping

    (first,) = run_ranks(lambda: executed(LOOP, tmp_path, patch=stop), 1)
    (rest,) = run_ranks(executed, 1, LOOP, tmp_path)
    (whole,) = run_ranks(executed, 1, LOOP, tmp_path / "whole")
    assert [values[0] for values in first[:-1]] == [1, 2] and first[-1] == (75,)
    assert first[:-1] + rest == whole


def test_a_run_of_the_library_holds_its_directory(tmp_path):
    """From `start` on, for as long as the run lives."""

    def held() -> bool:
        run = trainer.start(load(["experiment=demo", *TINY, f"run_dir={tmp_path}", "name=held"]))
        command = [sys.executable, "-c", LOCKED, str(run.directory)]
        other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        run.stream.close()
        return other.stdout.strip() == "in use"

    assert run_ranks(held, 1) == [True]
    lock(tmp_path / "held", wait_s=0).close()  # the run has ended, and its lock with it


LOCKED = """
import sys
from pathlib import Path
from trainer.ranks.lock import InUseError, lock
try:
    lock(Path(sys.argv[1]), wait_s=0)
except InUseError:
    print("in use")
"""


def test_parts_of_ones_own(tmp_path, monkeypatch):
    """The page's rule moves the biases, its tracker has the losses of metrics.jsonl, its optimizer's momentum
    is in the checkpoint, and its source's tokens are known by their fingerprint."""
    (tmp_path / "my_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    (told,) = run_ranks(executed, 1, USE, tmp_path)
    assert told[-1] in [(0,), (3,)]  # six steps of a toy: its balance is not what this test is about
    lines = map(json.loads, (tmp_path / "parts/metrics.jsonl").read_text().splitlines())
    expected = "".join(f"{line['step']},{line['loss']}\n" for line in lines)
    assert (tmp_path / "parts/losses.csv").read_text() == expected and expected.count("\n") == 6
    state = read_whole(tmp_path / "parts/checkpoints/step-00000006")
    assert any(state[name].any() for name in state if name.endswith("expert_bias_E"))
    assert any("momentum_buffer" in name for name in state)
    assert json.loads((tmp_path / "parts/data.json").read_text())["corpus"] == "counting, 200 tokens"


def test_importing_the_package_is_cheap():
    """Nothing but the standard library, in a fresh interpreter; a name brings what it needs."""
    program = (
        "import sys, trainer; before = {'torch', 'hydra', 'numpy'} & set(sys.modules);"
        "trainer.ConfigError; print(before, 'hydra' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "True", "False"], done.stderr


def test_every_public_name_is_there_and_type_checkers_see_the_same():
    tree = ast.parse((ROOT / "trainer" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted([*seen, "__version__"]) == trainer.__all__ == dir(trainer)
    assert seen == {name: home for home, names in trainer._HOMES.items() for name in names}
    for name in trainer.__all__:
        assert getattr(trainer, name) is not None
    with pytest.raises(AttributeError, match="module 'trainer' has no attribute 'nothing'"):
        trainer.nothing  # noqa: B018
