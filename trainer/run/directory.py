"""What lies in a run's directory, and may this run continue what is there?

<run_dir>/<name>/config.yaml          every setting, resolved
                 data.json            which corpus and which tokenizer
                 starts.jsonl         one line per start: from which step and checkpoint, under which program
                 tokenizer.json       as it was used
                 chat_template.jinja  that of a run of conversations; both are in each checkpoint, too
                 metrics.jsonl        one line per step; with evaluations.jsonl, experts.jsonl, alarms.jsonl
                 verdict.json         what became of the experts, once the run has reached its last step
                 bad_documents.*.txt  documents that were passed over, by data-parallel rank
                 checkpoints/         trainer/checkpoint/
                 lock                 held by the process that writes here (trainer/ranks/lock.py)
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from trainer.balance import Verdict
from trainer.checkpoint import Checkpoints, DamagedError, Found, read_manifest
from trainer.config import Config, ConfigError, atoms_of, read_plain, resolved_yaml
from trainer.data import BadDocument
from trainer.program import Program
from trainer.ranks.agree import broadcast_object, refuse_disagreement, refusing_on_all
from trainer.ranks.lock import SHORT_S, InUseError, lock
from trainer.records import append_line, write_text
from trainer.version import code_version

WAIT = (
    "TRIQUETRA_WAIT_S"  # in the environment: for how long a run waits for another one to leave its directory
)
LONGEST_WAIT_S = 86_400
# With another value of these it would be another run. All other settings may change when a run is continued.
FIXED = (
    "model",
    "seed",
    "data.source",
    "data.sources",
    "data.tokenizer",
    "data.num_streams",
    "data.shuffle",
    "data.document_mask",
    "data.packing",
    "data.holdout",
    "balance.rule._target_",
    "optim._target_",
    "train_only",
)


def checkpoints_of(config: Config) -> Checkpoints:
    c = config.checkpoint
    return Checkpoints(
        config.directory / "checkpoints",
        keep=c.keep,
        keep_every=c.keep_every,
        retries=c.retries,
        retry_s=c.retry_s,
    )


class Opened(NamedTuple):
    """A run's directory, this process's to write into."""

    held: TextIO | None  # the lock, on rank 0
    origin: Found | None  # the checkpoint to go on from
    changed: dict[str, list[Any]]  # settings that have another value than there: [before, now]; on rank 0
    about: dict[str, Any]  # for the manifests of this run's checkpoints
    texts: dict[str, str]  # files that go into each checkpoint


def open_directory(
    config: Config,
    checkpoints: Checkpoints,
    *,
    corpus: str | dict[str, str],
    tokenizer: Any,
    chat_template: str | None = None,
) -> Opened:
    """Takes the directory, finds where the run goes on, and refuses to continue another run.

    Collective. Raises: ConfigError, on all ranks; then nothing was changed. SaveError, on all ranks.
    """
    held = refusing_on_all(lambda: take(config), refusals=(ConfigError, InUseError))
    try:
        origin = find_checkpoint(config, checkpoints)
    except DamagedError as error:
        raise ConfigError(str(error)) from error
    tokenizer_text = tokenizer.to_str() if tokenizer is not None else None
    digest = hashlib.sha256(tokenizer_text.encode()).hexdigest()[:16] if tokenizer_text else None
    data = {"corpus": corpus, "tokenizer": digest}
    refuse_disagreement(fingerprints(data))
    changed = (
        refusing_on_all(
            lambda: changes(config, origin.path, data, is_own=origin.path.parent == checkpoints.directory)
        )
        if origin is not None
        else None
    )
    checkpoints.go_on_from(
        origin.step if origin is not None and origin.path.parent == checkpoints.directory else None
    )
    of_text = {"tokenizer.json": tokenizer_text, "chat_template.jinja": chat_template}
    texts = {"config.yaml": resolved_yaml(config)} | {name: text for name, text in of_text.items() if text}
    about = {
        "name": config.name,
        "code": code_version(),
        "torch": torch.__version__,
        "ranks": dist.get_world_size(),
        "parallel": asdict(config.parallel),
        "data": data,
    }
    return Opened(held, origin, changed or {}, about, texts)


def take(config: Config) -> TextIO:
    """Raises: ConfigError, InUseError."""
    text = os.environ.get(WAIT, f"{SHORT_S:g}")
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = math.nan
    if not 0 <= wait_s <= LONGEST_WAIT_S:
        limit = f"must be seconds from 0 to {LONGEST_WAIT_S:,}"
        raise ConfigError(f"{WAIT}={text}: {limit}; unset, a run waits for {SHORT_S:g}")
    with writing(run_dir=config.run_dir, name=config.name):
        return lock(config.directory, wait_s=wait_s)


@contextmanager
def writing(**keys: Any) -> Iterator[None]:
    """Where the system refuses to write: ConfigError with the keys that say where."""
    try:
        yield
    except OSError as error:
        refusal = f"{', '.join(f'{key}={value}' for key, value in keys.items())}: cannot be written to"
        reason = f"({error.strerror}: {error.filename})" if error.filename else f"({error.strerror})"
        raise ConfigError(f"{refusal} {reason}; choose another directory with run_dir=") from None


def find_checkpoint(config: Config, own: Checkpoints) -> Found | None:
    """Where this run goes on: its own newest good checkpoint, else what `branch` names. Collective.

    Raises: ConfigError, DamagedError.
    """
    if (checkpoint := own.newest_good()) is not None or config.branch is None:
        return checkpoint
    path = Path(config.branch)
    # a run may have such a name
    if not path.name.startswith("step-") or broadcast_object((path / "checkpoints").is_dir()):
        checkpoint = Checkpoints(path / "checkpoints").newest_good()
    elif (step := path.name.removeprefix("step-")).isdecimal():
        checkpoint = Found(int(step), path) if broadcast_object(path.is_dir()) else None
        if checkpoint is not None and (problems := Checkpoints(path.parent).verify(checkpoint.step)):
            raise ConfigError(f"branch={config.branch}: " + "\n".join(problems))
    if checkpoint is None:
        example = "<run>/checkpoints/step-00000100"
        raise ConfigError(f"branch={config.branch}: no checkpoint there; give a run's directory or {example}")
    return checkpoint


def record_start(config: Config, *, program: Program, step: int, tokens: int, opened: Opened) -> None:
    """Writes the files that describe the run, and adds a line to starts.jsonl.

    Call it once nothing can be refused any more, or the files would describe a run that never was. A run may
    continue under other settings, and config.yaml has only the latest ones: hence starts.jsonl.
    """
    for name, text in {**opened.texts, "data.json": json.dumps(opened.about["data"])}.items():
        write_text(config.directory / name, text)
    spans = [
        {
            "start": span.start,
            "end": span.end,
            **asdict(span.now),
            "lr": asdict(span.lr),
            "bias_rate": asdict(span.bias_rate),
        }
        for span in program.spans
    ]
    loaded = str(opened.origin.path) if opened.origin else None
    init_from = config.init_from if opened.origin is None else None
    origin = {
        "loaded": loaded,
        "init_from": init_from,
        "changed": opened.changed,
        "code": opened.about["code"],
    }
    line = {"step": step, "tokens": tokens, **origin, "program": spans}
    append_line(config.directory / "starts.jsonl", json.dumps(line))


def record_rollback(config: Config, *, step: int, steps: int) -> None:
    """Adds a line to starts.jsonl: the run went back to `step` and passed over the data of the next
    `steps`.
    """
    line = {"step": step, "rolled_back": True, "passed_over_steps": steps}
    append_line(config.directory / "starts.jsonl", json.dumps(line))


def record_verdict(config: Config, verdict: Verdict, *, step: int) -> None:
    """Of a run that has reached its last step: what its exit code says, and from which evidence."""
    about = asdict(verdict) | {"is_known": verdict.is_known, "text": str(verdict)}
    write_text(
        config.directory / "verdict.json", json.dumps({"step": step, "ok": verdict.ok, **about}) + "\n"
    )


def changes(
    config: Config, checkpoint: Path, data: Mapping[str, Any], *, is_own: bool
) -> dict[str, list[Any]]:
    """Settings that differ from the checkpoint's: [before, now]. is_own: it is of this run, not of one that
    this one branches from. Raises: ConfigError if the run would not be the same run.
    """
    before, now = (
        dotted_keys(read_plain(checkpoint / "config.yaml")),
        dotted_keys(OmegaConf.create(resolved_yaml(config))),
    )
    before |= fingerprints(read_manifest(checkpoint).get("data", {}))
    now |= fingerprints(data)
    changed = {
        key: [before.get(key), now.get(key)] for key in {**before, **now} if before.get(key) != now.get(key)
    }
    if config.anew and not is_own:
        refuse_other_shape(checkpoint, changed)
        return changed
    fixed = [key for key in changed if any(f"{key}.".startswith(f"{name}.") for name in FIXED)]
    if "train_only" in fixed and not is_own:
        refuse_parts_without_state(checkpoint, *changed["train_only"])
        fixed.remove("train_only")
    if fixed := fixed or [key for key in fingerprints(data) if key in changed]:
        old, new = (", ".join(f"{key}={changed[key][i]}" for key in fixed) for i in (0, 1))
        remedy = "set it back to continue, or choose another name= for a new run"
        if not is_own:
            remedy += "; anew=true takes its weights alone"
        raise ConfigError(f"{checkpoint} is of a run with {old}, now it is {new}; {remedy}")
    return changed


def refuse_other_shape(checkpoint: Path, changed: Mapping[str, Sequence[Any]]) -> None:
    """Of a run whose weights are taken: it may have fewer rows in embedding and head. Raises: ConfigError."""
    wrong = {key: values for key, values in changed.items() if key.startswith("model.")}
    for key in ("model.expert_dtype", "model.router_dtype"):
        wrong.pop(key, None)
    before, now = wrong.pop("model.vocab_size", (0, 0))
    if before > now:
        wrong["model.vocab_size"] = (before, now)
    if wrong:
        text = ", ".join(f"{key}={values[0]}, now {values[1]}" for key, values in wrong.items())
        raise ConfigError(f"{checkpoint} is of another model: {text}; use the first of them")


def fingerprints(data: Mapping[str, Any]) -> dict[str, Any]:
    return {f"the {name}'s fingerprint": value for name, value in data.items()}


def dotted_keys(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"model.dim": 64, ...}"""
    nodes = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    if not isinstance(nodes, dict) or not nodes:
        return {prefix.rstrip("."): nodes}
    return {
        key: value
        for name, node in nodes.items()
        for key, value in dotted_keys(node, f"{prefix}{name}.").items()
    }


def refuse_parts_without_state(
    checkpoint: Path, before: Sequence[str] | None, now: Sequence[str] | None
) -> None:
    """A branch may train less than the run that it comes from: the optimizer knows nothing of the rest."""
    if not atoms_of(now) <= atoms_of(before):
        raise ConfigError(
            f"{checkpoint} is of a run with train_only={before}, whose optimizer knows no other part; now it "
            f"is train_only={now}: train that part or less, or start from the run's export with init_from="
        )


class BadDocumentLog:
    """One line for each document that is passed over: where it lies and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, bad: BadDocument) -> None:
        append_line(self.path, str(bad))
