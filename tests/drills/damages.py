"""A checkpoint is not what was written: is it found, and is anything that lies in it ever run?"""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.drills.disks import tree
from tests.drills.jobs import INTERVAL, STEPS, Where, same_losses, shared, undisturbed
from tests.drills.table import Facts, drill
from trainer.ranks.stop import PREEMPTED, REFUSED

NEWEST = STEPS - INTERVAL


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """4 KiB, as a file system gives them back that lost them."""
    content = bytearray(path.read_bytes())
    start = len(content) // 2
    content[start : start + 4096] = bytes(min(4096, len(content) - start))
    path.write_bytes(content)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("rank-00001.safetensors", flipped),
    ("manifest.json", Path.unlink),
    ("rank-00000.safetensors", truncated),
    ("rank-00000.safetensors", zeroed),
    ("rank-00001.safetensors", Path.unlink),
    ("index.json", flipped),
    ("index.json", truncated),
    ("manifest.json", flipped),
    ("manifest.json", truncated),
    ("config.yaml", flipped),
]


def stopped(where: Where) -> None:
    """A run with three checkpoints, in the middle of its way."""
    of = shared() / "stopped"
    if not of.exists():
        once = Where(shared() / "stopping")
        job = once.finish("checkpoint.keep=9", fault={"stop_at": NEWEST})
        assert set(job.codes) == {PREEMPTED} and once.checkpoints() == [5, 10, 15], job.output
        shutil.copytree(once.run, of)
    where.copy_of(of)


@drill(limit_s=300, short=True)
def a_damaged_checkpoint(directory: Path, short: bool) -> Facts:
    """shards truncated, with a flipped bit, with 4 KiB of zeros, deleted; index, manifest, config.yaml with a
    flipped bit, truncated; no manifest: each on the newest checkpoint · falls back to the one before, and
    says which file it was; the damaged one is set aside, not deleted"""
    facts, reference = Facts(), undisturbed(2)
    for number, (file, damage) in enumerate(DAMAGES[:2] if short else DAMAGES):
        where = Where(directory / str(number))
        stopped(where)
        damage(where.checkpoint(NEWEST) / file)
        before = tree(where.checkpoint(NEWEST))
        job = where.completes("checkpoint.keep=9")
        what = f"{file} {damage.__name__}"
        assert where.starts()[-1]["step"] == NEWEST - INTERVAL, (
            f"{what}: went on from {where.starts()[-1]['step']}"
        )
        assert f"DAMAGED: {where.checkpoint(NEWEST) / file}" in job.output, (
            f"{what}: nobody said so:\n{job.output}"
        )
        assert tree(where.checkpoint(NEWEST).with_suffix(".damaged")) == before, (
            f"{what}: it was not kept as it was"
        )
        facts.lost.append(INTERVAL)
        facts.recovered_s.append(where.recovered_s(job.started_s))
        facts.equal = same_losses(where, reference)
        where.whole()
    facts.note = f"{len(facts.lost)} kinds"
    return facts


@drill(limit_s=120)
def all_checkpoints_damaged(directory: Path, short: bool) -> Facts:
    """all of them damaged, each in another way · refused with exit code 2, naming the files; nothing is
    written over
    """
    where = Where(directory)
    stopped(where)
    for step, (file, damage) in zip((5, 10, 15), DAMAGES, strict=False):
        damage(where.checkpoint(step) / file)
    before = tree(where.run)
    job = where.finish()
    assert set(job.codes) == {REFUSED}, f"{job.codes}\n{job.output}"
    assert "none of the checkpoints can be used (steps 5, 10, 15)" in job.output
    assert all(
        str(where.checkpoint(step) / file) in job.output
        for step, (file, _) in zip((5, 10, 15), DAMAGES, strict=False)
    )
    assert (after := tree(where.run)) == before, f"changed: {set(after.items()) ^ set(before.items())}"
    return Facts()


class Poison:
    """What a pickle runs when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@drill(limit_s=150)
def a_poisoned_pickle(directory: Path, short: bool) -> Facts:
    """a pickle that would make a file, as .metadata and in place of a shard and of the index · it never
    runs
    """
    facts, ran = Facts(), directory / "ran"
    poison = pickle.dumps(Poison(ran))
    pickle.loads(poison)
    assert ran.exists(), "the poison is none"
    ran.unlink()
    before = NEWEST - INTERVAL
    for file, resumed in ((".metadata", NEWEST), ("rank-00000.safetensors", before), ("index.json", before)):
        where = Where(directory / file.strip("."))
        stopped(where)
        (where.checkpoint(NEWEST) / file).write_bytes(poison)
        job = where.completes()
        assert not ran.exists(), f"{file} was unpickled"
        assert where.starts()[-1]["step"] == resumed, job.output
        facts.lost.append(NEWEST - resumed)
        facts.recovered_s.append(where.recovered_s(job.started_s))
        facts.equal = same_losses(where, undisturbed(2))
    return facts
