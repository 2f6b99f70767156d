"""Does the file system keep what checkpoints rely on, for every host, and is there room?

A checkpoint is written into a draft, made durable, and renamed; other hosts must see the new name and what
lies in it, and a lock must keep a second run out. Room must be there for two: the old one goes when the new
one is whole.
"""

import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint import make_durable, write_durably
from trainer.config import Config
from trainer.preflight.finding import Finding
from trainer.ranks.lock import InUseError, lock
from trainer.ranks.meeting import Meeting
from trainer.run.memory import STATE, WEIGHT
from trainer.size import count_parameters

SEEN_S = 10.0  # in which other hosts must see a name; NFS keeps what it has listed for a while
CHECKPOINTS = 2
GB = 1e9


def tried(config: Config, meeting: Meeting, hosts: Sequence[str]) -> list[Finding]:
    """Of this rank's host. Collective; the first rank of each host acts."""
    host, base = hosts[meeting.rank], Path(config.run_dir)
    is_first = hosts.index(host) == meeting.rank
    directory = base / meeting.broadcast_object(f".preflight-{secrets.token_hex(4)}")
    names = [other for rank, other in enumerate(hosts) if hosts.index(other) == rank]
    try:
        refused = meeting.all_gather_objects(refusal(directory, host) if is_first else None)
        if any(refused):
            why = refused[meeting.rank]
            return [Finding(host, str(base), why, "can be written to")] if why else []
        findings = unseen(directory, names, host) + room(config, base, host) if is_first else []
        return findings + locked(directory, meeting, host)
    finally:
        if meeting.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


def refusal(directory: Path, host: str) -> str | None:
    """Why this host cannot write there; None: it has."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        commit(directory, host)
    except OSError as error:
        return error.strerror or str(error)
    return None


def commit(directory: Path, host: str) -> None:
    """As a checkpoint is."""
    draft = directory / f".{host}.draft"
    draft.mkdir()
    write_durably(draft / "host", host)
    make_durable(draft)
    draft.rename(directory / host)
    make_durable(directory)


def unseen(directory: Path, names: Sequence[str], host: str) -> list[Finding]:
    """Other hosts whose directory is not there or does not hold what was written, or draft is still there."""
    deadline_s = time.monotonic() + SEEN_S
    while missing := [name for name in names if not is_whole(directory, name)]:
        if time.monotonic() > deadline_s:
            limit = f"seen within {SEEN_S:g} s"
            return [
                Finding(host, f"{directory.parent}, files of {name}", "not seen", limit) for name in missing
            ]
        time.sleep(0.1)
    return []


def is_whole(directory: Path, name: str) -> bool:
    try:
        text = (directory / name / "host").read_text()
    except OSError:
        return False
    return text == name and not (directory / f".{name}.draft").exists()


def locked(directory: Path, meeting: Meeting, host: str) -> list[Finding]:
    """Rank 0 holds the lock; no other process may have it."""
    held = meeting.together(lambda: lock(directory) if meeting.rank == 0 else None)
    findings = []
    if meeting.rank:
        try:
            lock(directory, wait_s=0.0).close()
            findings = [
                Finding(host, f"{directory.parent}, lock of rank 0", "not held", "held over all hosts")
            ]
        except InUseError:
            pass
    meeting.all_gather_objects("tried")
    if held is not None:
        held.close()
    return findings


def room(config: Config, base: Path, host: str) -> list[Finding]:
    free, needed = shutil.disk_usage(base).free, CHECKPOINTS * checkpoint_bytes(config)
    if free >= needed:
        return []
    return [
        Finding(
            host, f"{base}, free", f"{free / GB:,.1f} GB", f"{needed / GB:,.1f} GB, {CHECKPOINTS} checkpoints"
        )
    ]


def checkpoint_bytes(config: Config) -> int:
    """At least: weights and optimizer state, in float32."""
    each = WEIGHT + STATE.get(config.optim["_target_"], 0)
    return each * count_parameters(config.model).total


def directory_problem(base: Path) -> str | None:
    """Why no run could be written there; None if one could. A run makes the last directory itself."""
    there = base if base.exists() else base.parent
    if not there.is_dir():
        return f"there is no directory {there}"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to"
    return None
