"""How do the evaluations of a configuration become objects with rows?

Rank 0 makes all rows and hands them to the others: data is read once, and what cannot be read is refused on
all ranks before the first step. A million tokens are 32 MB.
"""

import json
from collections.abc import Sized
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from trainer.config import ConfigError
from trainer.data import Source
from trainer.evaluate.rows import Part
from trainer.evaluate.schedule import Evaluation, Evaluations
from trainer.evaluate.sets import Material
from trainer.metrics import EVALUATIONS
from trainer.ranks.agree import broadcast_object, refusing_on_all
from trainer.run.build import bind, source_of
from trainer.run.state import Run


def start_evaluations(run: Run) -> None:
    """Gives the run its evaluations, and what evaluations.jsonl has of them.

    Collective. Raises: ConfigError, on all ranks.
    """
    named = {name: made(name, node) for name, node in run.config.evaluate.items()}
    parts = {name: parts_of(run, name, evaluation) for name, evaluation in named.items()}
    path = run.directory / EVALUATIONS
    before = broadcast_object(refusing_on_all(partial(results_before, path, step=run.step)))
    run.evaluations = Evaluations(named, parts, before=before, keep_best=run.config.checkpoint.keep_best)
    run.evaluations.rewind(run)


def made(name: str, node: dict[str, Any]) -> Evaluation:
    try:
        return instantiate(node, _recursive_=False)  # a source is opened on rank 0 alone
    except (ConfigError, ValueError, TypeError, InstantiationException) as error:
        raise ConfigError(f"evaluate.{name}: {one_line(error)}") from error


def parts_of(run: Run, name: str, evaluation: Evaluation) -> list[Part]:
    """Collective. Raises: ConfigError."""

    def make() -> list[Part]:
        try:
            return evaluation.parts(material(run, name))
        except Exception as error:  # of a user's own class, or of a source
            text = one_line(error)
            key = f"evaluate.{name}"
            raise ConfigError(text if text.startswith(key) else f"{key}: {text}") from error

    return broadcast_object(refusing_on_all(make))


def material(run: Run, name: str) -> Material:
    config = run.config
    nodes = config.data.sources or {"": config.data.source}

    def make_source(node: Any) -> Source:
        source = source_of(node, cache_dir=config.data.cache_dir)
        bind(source, run.stream.tokenizer, config.data, key=f"evaluate.{name}")
        return source

    readers = zip(run.stream.names or [""], run.stream.readers, strict=True)
    return Material(
        name=name,
        sources={key: source_again(reader.source, nodes[key], make_source) for key, reader in readers},
        make_source=make_source,
        tokenizer=run.stream.tokenizer,
        vocab_size=config.model.vocab_size,
        seq_len=run.program.spans[0].now.seq_len,
        holdout=config.data.holdout,
        max_document_mb=config.data.max_document_mb,
    )


def source_again(source: Source, node: Any, make_source: Any) -> Source:
    """One that only reads forward is in use by the stream, so it is opened a second time."""
    return source if isinstance(source, Sized) else make_source(node)


def results_before(path: Path, *, step: int) -> list[dict[str, Any]]:
    """Lines of this step and earlier ones; one that was cut by a kill or a full disk is no line."""
    if not step or not path.is_file():
        return []
    results = list[dict[str, Any]]()
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):
            results.append(json.loads(line))
    return [result for result in results if isinstance(result, dict) and result.get("step", step + 1) <= step]


def one_line(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__
