"""Weights that others load: a run's checkpoint as an AfmoeForCausalLM of transformers.

    triquetra export runs/demo out                       its newest checkpoint
    triquetra export runs/demo 200 out                   that of step 200
    triquetra export runs/demo/checkpoints/step-00000200 out --dtype bfloat16
    triquetra export runs/demo out --verify --prompt "def main():"
    triquetra export runs/demo out --gguf out.gguf       for llama.cpp, by its own converter

OUT gets safetensors, config.json, generation_config.json, the tokenizer and its chat template. It must not be
there yet; until all is written and checked it is called OUT.draft. --verify and --prompt need transformers
(pip install 'triquetra[chat]').

Exit codes: 0 done · 1 the checkpoint is damaged, or --verify found a difference · 2 refused, or OUT cannot be
written.
"""

import argparse
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from trainer import terminal
from trainer.checkpoint import MANIFEST, Checkpoints, DamagedError, make_durable, problems, read_manifest
from trainer.config import Config, ConfigError, reread
from trainer.model.hf import export_problems
from trainer.weights.gguf import convert, refuse_gguf
from trainer.weights.tensors import Weights, plan, write_weights
from trainer.weights.texts import tokenizer_of, write_texts
from trainer.weights.verify import VerifyError, compare, continuation, need_transformers

OK, DAMAGED, REFUSED, INTERRUPTED = 0, 1, 2, 130
OWN_FILES = ("*.safetensors", "*.json", "*.jinja")  # all that a draft can hold


def main(arguments: list[str] | None = None) -> int:
    refused = dict.fromkeys((ConfigError, OSError, ValueError), REFUSED)
    return terminal.run(
        partial(command, arguments),
        {DamagedError: DAMAGED, VerifyError: DAMAGED, **refused, KeyboardInterrupt: INTERRUPTED},
        interrupted="interrupted; nothing was exported",
    )


def command(arguments: list[str] | None) -> int:
    options = parsed(arguments)
    if options.verify or options.prompt is not None:
        need_transformers()
    try:
        export(options)
    except OSError as error:
        remedy = "RUN must be readable, and OUT a place that can be written to and has room"
        raise ConfigError(f"{error}; {remedy}") from error
    return OK


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """In place of argparse's usage and exit. Raises: ConfigError."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Raises: ConfigError."""
    as_written = argparse.RawTextHelpFormatter
    parser = OneLineParser(prog="triquetra export", description=__doc__, formatter_class=as_written)
    parser.add_argument("run", type=terminal.path, help="a run's directory, or one of its checkpoints")
    parser.add_argument("step", type=int, nargs="?", help="without it: the newest checkpoint")
    parser.add_argument("out", type=terminal.path, help="the directory to be made")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the weights; without it: the run's"
    )
    parser.add_argument("--shard-gb", type=float, default=5.0, help="[GB] of one file at most; 5 without it")
    parser.add_argument("--verify", action="store_true", help="compare with transformers: logits and tokens")
    parser.add_argument(
        "--prompt", metavar="TEXT", help="let transformers continue a text with what was written"
    )
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        type=terminal.path,
        help="one file for llama.cpp, made of OUT by its converter",
    )
    # so that options may stand anywhere among RUN, step and OUT
    options = parser.parse_intermixed_args(arguments)
    if not options.shard_gb > 0:
        parser.error(f"--shard-gb={options.shard_gb}: must be above 0")
    if options.prompt is not None and any(0xD800 <= ord(character) < 0xE000 for character in options.prompt):
        parser.error(f"--prompt={options.prompt!r}: must be text in UTF-8")
    return options


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The checkpoint that is exported, verified."""

    path: Path
    step: int
    tokens: int  # seen by the run
    config: Config
    tokenizer: Any


def export(options: argparse.Namespace) -> None:
    """Raises: DamagedError, VerifyError, ConfigError, ValueError, OSError; then there is no OUT."""
    refuse_existing(options.out, draft_of(options.out))
    origin = origin_of(checkpoint_of(options.run, options.step))
    if options.prompt is not None and origin.tokenizer is None:
        raise ConfigError(
            f"--prompt: {origin.path} has no tokenizer, its run's source gave tokens; leave --prompt out"
        )
    if options.gguf is not None:
        refuse_gguf(options.gguf, origin.config.model, has_tokenizer=origin.tokenizer is not None)
    shard_bytes = options.shard_gb * 1e9
    summary = export_to(
        origin, options.out, dtype=options.dtype, shard_bytes=shard_bytes, verify=options.verify
    )
    print(f"{options.out}: step {origin.step} of {origin.config.name}, {summary}")
    for problem in export_problems(origin.config.model):
        print(f"note: {problem.text}")
    if options.gguf is not None:
        print(convert(options.out, options.gguf, dtype=options.dtype or origin.config.dtype))
    if options.prompt is not None:
        text = continuation(options.out, options.prompt)
        print(f"transformers continues {options.prompt!r}:\n{text}")


def export_to(
    origin: Origin, out: Path, *, dtype: str | None = None, shard_bytes: float = 5e9, verify: bool = False
) -> str:
    """`out`, which must not be there, whole or not at all. Returns what it is, in words. Raises: as it."""
    if fatal := [problem.text for problem in export_problems(origin.config.model) if problem.is_fatal]:
        raise ConfigError("; ".join(fatal))
    dtype, draft = dtype or origin.config.dtype, draft_of(out)
    shutil.rmtree(draft, ignore_errors=True)  # of an export that was killed
    draft.mkdir(parents=True)
    try:
        summary = write(origin, draft, dtype=dtype, shard_bytes=shard_bytes)
        if verify:
            verified = compare(
                origin.path, origin.config, draft, dtype=getattr(torch, dtype), tokenizer=origin.tokenizer
            )
            summary = f"{summary}\n{verified}"
        make_durable(draft)
        draft.rename(out)
        make_durable(out.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return summary


def draft_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.draft")


def write(origin: Origin, draft: Path, *, dtype: str, shard_bytes: float) -> str:
    """Everything that OUT holds. Returns what it is, in words."""
    shards = plan(origin.config.model, dtype=getattr(torch, dtype), shard_bytes=shard_bytes)
    write_weights(Weights(origin.path, origin.config.model), shards, draft)
    write_texts(
        draft,
        checkpoint=origin.path,
        config=origin.config,
        dtype=dtype,
        tokens=origin.tokens,
        tokenizer=origin.tokenizer,
    )
    num_tensors, num_bytes = (
        sum(len(shard.kinds) for shard in shards),
        sum(shard.num_bytes for shard in shards),
    )
    files = "1 file" if len(shards) == 1 else f"{len(shards)} files"
    return f"{num_tensors:,} tensors in {dtype}, {num_bytes / 1e6:,.1f} MB in {files}"


def refuse_existing(out: Path, draft: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already; give another name, or remove it")
    if foreign := [path for path in draft.glob("*") if not any(path.match(name) for name in OWN_FILES)]:
        raise ConfigError(
            f"{draft} is where an export begins, but it holds {foreign[0].name}; move that, or give "
            "another OUT"
        )


def is_run(path: Path) -> bool:
    """A run's directory, or one of its checkpoints."""
    return (path / "checkpoints").is_dir() or (path.name.startswith("step-") and (path / MANIFEST).is_file())


def checkpoint_of(run: Path, step: int | None) -> Path:
    """What `run` (a run's directory, or a checkpoint) and `step` name. Raises: ConfigError if it is not
    there.
    """
    if not run.name.startswith("step-") or (run / "checkpoints").is_dir():
        checkpoints = Checkpoints(run / "checkpoints")
        steps = checkpoints.all_steps()
        if not steps:
            raise ConfigError(f"{run}: no run's directory with a checkpoint, and no checkpoint")
        if step is not None and step not in steps:
            raise ConfigError(f"step {step}: {run} has steps {', '.join(map(str, steps))}")
        return checkpoints.path(steps[-1] if step is None else step)
    if step is not None:
        raise ConfigError(
            f"step {step}: {run} is one checkpoint; leave the step out, or give the run's directory"
        )
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such checkpoint")
    return run


def origin_of(path: Path) -> Origin:
    """Of a checkpoint, verified. Raises: DamagedError naming an older one that is good."""
    if damages := problems(path):
        raise DamagedError("\n".join([*damages, remedy(path)]))
    manifest, config = read_manifest(path), reread(path / "config.yaml")
    return Origin(
        path=path,
        step=manifest["step"],
        tokens=manifest.get("tokens", 0),
        config=config,
        tokenizer=tokenizer_of(path, config),
    )


def remedy(path: Path) -> str:
    """The newest good checkpoint before a damaged one."""
    checkpoints = Checkpoints(path.parent)
    for step in reversed(checkpoints.all_steps()):
        if checkpoints.path(step).name < path.name and not problems(checkpoints.path(step)):
            return f"the checkpoint of step {step} is good: give that step"
    return "no older checkpoint is good"


if __name__ == "__main__":
    sys.exit(main())
