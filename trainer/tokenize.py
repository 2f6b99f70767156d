"""Write a corpus once as tokens that are memory mapped: data=tokens reads it, row for row the same.

    triquetra tokenize corpus data=jsonl 'data.source.path=docs/*.jsonl' data.tokenizer=tokenizer.json
    triquetra tokenize corpus data=parquet data.source.path=docs data.backend=fastokens processes=32
    triquetra train experiment=demo data=tokens data.source.path=corpus

The first word is the directory to be made. Until all is written it is called OUT.draft; the same command
goes on with the draft of one that was killed.

    processes   that read and tokenise; 2 without it
    shard_mb    [MB] of text in a shard, about; 1024 without it

All else is as for a run: its data.source, data.tokenizer, data.backend, data.max_document_mb and
data.cache_dir count (and model.vocab_size for data.tokenizer=train). docs/data.md#tokens has the format.

Exit codes: 0 done · 2 refused, or OUT cannot be written · 4 the corpus cannot be read · 130 interrupted.
"""

import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from trainer import terminal
from trainer.config import Config, ConfigError, load, looked_up
from trainer.data import DataError, Plan, Reader, Tokenizing, finish, load_tokenizer, plan_of
from trainer.lab.options import parted, refuse_misspelt
from trainer.ranks.lock import InUseError, lock
from trainer.ranks.stop import INTERRUPTED, NO_DATA, OK, REFUSED
from trainer.run.build import refusing, sources_of

OWN = {"processes": 2, "shard_mb": 1024}
# what a run needs and a corpus does not; an experiment may say otherwise
STAND_INS = ("name=tokenize", "global_batch=1", "micro_batch=1", "seq_len=1024", "steps=1")
MOST = {"processes": 1024, "shard_mb": 1_000_000}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    codes = {DataError: NO_DATA, KeyboardInterrupt: INTERRUPTED}
    return terminal.run(
        partial(command, arguments),
        codes | dict.fromkeys((ConfigError, InUseError, OSError), REFUSED),
        interrupted="interrupted; the same command goes on",
    )


def command(arguments: list[str]) -> int:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    overrides, options = parted(arguments, tuple(OWN))
    if (text := looked_up(overrides, __doc__)) is not None:
        print(text)
        return OK
    if not overrides or "=" in overrides[0] or not overrides[0].strip():
        raise ConfigError(
            "the first word is the directory to be made, like: triquetra tokenize corpus data=txt"
        )
    out, overrides = Path(overrides[0]).expanduser(), overrides[1:]
    refuse_misspelt(overrides, tuple(OWN))
    values = {key: whole(key, options.get(key, str(default))) for key, default in OWN.items()}
    refuse_existing(out)
    tokenize(load([*STAND_INS, *overrides]), out, **values)
    return OK


def whole(key: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MOST[key]:
        raise ConfigError(f"{key}={text}: must be a whole number from 1 to {MOST[key]:,}")
    return int(text)


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: is there already; give another directory, or delete it")


def tokenize(config: Config, out: Path, *, processes: int, shard_mb: int) -> None:
    """Raises: ConfigError, DataError, InUseError, OSError; then there is no OUT."""
    d = config.data
    if d.sources:
        raise ConfigError(
            f"data.sources={sorted(d.sources)}: tokenize writes one corpus; give each as data.source"
        )
    if d.tokenizer is None:
        raise ConfigError("data.tokenizer=null: give the tokenizer that makes the ids, or train")
    with refusing():
        source = sources_of(d, vocab_size=config.model.vocab_size)
        sizes = {"vocab_size": config.model.vocab_size, "cache_dir": d.cache_dir}
        tokenizer = load_tokenizer(d.tokenizer, source=source, **sizes)
        plan = plan_of(source, tokenizer, shard_mb=shard_mb, max_document_mb=d.max_document_mb)
    draft = out.with_name(f"{out.name}.draft")
    held = lock(draft)
    reader = Reader(
        source,
        key="data.source",
        seed=0,
        shuffle=False,
        num_streams=1,
        retries=d.retries,
        wait_s=d.retry_s,
    )
    with refusing():
        tokenizing = Tokenizing(source, tokenizer, plan, draft, backend=d.backend, reader=reader)
        with Progress(plan) as progress:
            shards = tokenizing.run(processes=processes, report=progress.add)
        finish(tokenizing, shards, out)
    held.close()
    num_bad = sum(len(shard.bad) for shard in shards)
    print(
        f"{out}: {sum(shard.num_tokens for shard in shards):,} tokens of {plan.num_documents:,} documents in "
        f"{len(shards):,} shards; {num_bad:,} documents have none (corpus.json says why)"
    )


class Progress:
    """Shards that are done: a bar on a terminal, else a line for every tenth of them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.done, self.tokens, self.start_s = plan, 0, 0, time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self.task = self.bar.add_task("shards", total=self.plan.num_shards)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def add(self, k: int, shard: Any) -> None:
        tenths = 10 * self.done // self.plan.num_shards
        self.done, self.tokens = self.done + 1, self.tokens + shard.num_tokens
        speed = self.tokens / max(1e-9, time.perf_counter() - self.start_s) / 1e6
        text = f"{self.tokens:,} tokens, {speed:.2f} million a second"
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, description=text)
        elif 10 * self.done // self.plan.num_shards > tenths:
            line = f"{self.done:,} of {self.plan.num_shards:,} shards, {text}"
            print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
