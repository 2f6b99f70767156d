"""What lies in a run's directory, and may this run continue what is there?

    <run_dir>/<name>/config.yaml          every setting, resolved
                     data.json            which corpus and which tokenizer
                     starts.jsonl         one line per start: from which step and checkpoint, under which program
                     tokenizer.json       as it was used
                     metrics.jsonl        one line per step
                     bad_documents.*.txt  documents that were passed over, by data-parallel rank
                     checkpoints/         trainer/checkpoint.py
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from trainer.checkpoint import Checkpoints
from trainer.config import Config, ConfigError, resolved_yaml
from trainer.data import BadDocument
from trainer.program import Program

# A run is these: with another value it would not be the same run. All else may change when it is continued.
FIXED = ("model", "seed", "data.source", "data.sources", "data.tokenizer", "data.num_streams", "data.shuffle",
         "data.document_mask", "data.packing", "balance.rule._target_", "optim._target_")  # fmt: skip


def run_directory(config: Config) -> Path:
    return Path(config.run_dir) / config.name


def checkpoints_of(config: Config) -> Checkpoints:
    return Checkpoints(run_directory(config) / "checkpoints", keep=config.checkpoint.keep)


def find_checkpoint(config: Config) -> tuple[Checkpoints, int] | None:
    """Where this run goes on: its own newest checkpoint, else what `branch` names. Collective. Raises: ConfigError."""
    own = checkpoints_of(config)
    if (step := own.latest()) is not None:
        return own, step
    if config.branch is None:
        return None
    path = Path(config.branch)
    is_one = path.name.startswith("step-")
    other = Checkpoints(path.parent if is_one else path / "checkpoints", keep=config.checkpoint.keep)
    step = int(path.name.removeprefix("step-")) if is_one else other.latest()
    if step is None or step not in other.steps():
        example = "<run>/checkpoints/step-00000100"
        raise ConfigError(f"branch={config.branch}: no checkpoint there; give a run's directory or {example}")
    return other, step


def record_start(config: Config, *, program: Program, step: int, tokens: int, loaded: Path | None) -> None:
    """Adds a line to starts.jsonl: a run may continue under another program, and config.yaml has the latest only."""
    spans = [
        {"start": span.start, "end": span.end, **asdict(span.now), "lr": asdict(span.lr), "bias_rate": asdict(span.bias_rate)}
        for span in program.spans
    ]
    line = {"step": step, "tokens": tokens, "loaded": str(loaded) if loaded else None, "program": spans}
    with (run_directory(config) / "starts.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def open_directory(config: Config, *, corpus: str | dict[str, str], tokenizer) -> None:
    """Rank 0 writes what describes the run; all ranks refuse to continue another one. Collective. Raises: ConfigError."""
    answer: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            _open(config, corpus=corpus, tokenizer=tokenizer)
        except ConfigError as error:
            answer = [str(error)]
    dist.broadcast_object_list(answer)
    if answer[0] is not None:
        raise ConfigError(answer[0])


def _open(config: Config, *, corpus: str | dict[str, str], tokenizer) -> None:
    directory = run_directory(config)
    tokenizer_text = tokenizer.to_str() if tokenizer is not None else None
    digest = hashlib.sha256(tokenizer_text.encode()).hexdigest()[:16] if tokenizer_text else None
    data = {"corpus": corpus, "tokenizer": digest}
    if checkpoints_of(config).steps():
        _refuse_another_run(config, directory, data)
    elif config.branch is not None:
        _refuse_another_run(config, _run_of(Path(config.branch)), data)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(resolved_yaml(config))
    (directory / "data.json").write_text(json.dumps(data))
    if tokenizer_text:
        (directory / "tokenizer.json").write_text(tokenizer_text)


def _run_of(branch: Path) -> Path:
    directory = branch.parent.parent if branch.name.startswith("step-") else branch
    if not (directory / "config.yaml").is_file():
        raise ConfigError(f"branch={branch}: {directory} is no run's directory, it has no config.yaml")
    return directory


def _refuse_another_run(config: Config, directory: Path, data: dict) -> None:
    before, now = OmegaConf.load(directory / "config.yaml"), OmegaConf.create(resolved_yaml(config))
    pairs = {key: (OmegaConf.select(before, key), OmegaConf.select(now, key)) for key in FIXED}
    saved = json.loads((directory / "data.json").read_text())
    pairs |= {f"the {name}'s fingerprint": (saved[name], data[name]) for name in data}
    for key, (old, new) in pairs.items():
        if old != new:
            raise ConfigError(
                f"{directory} holds a run with {key}={old}, now it is {key}={new}; "
                f"set it back to continue, or choose another name= for a new run"
            )


class BadDocumentLog:
    """One line for each document that is passed over: where it lies and what is wrong with it."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, bad: BadDocument) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(f"{bad}\n")
