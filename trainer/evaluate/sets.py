"""How well does the model predict text that it was not trained on? Loss by source and by position.

`HeldOut` takes documents of the training sources that `data.holdout` sets apart; `Validation` takes those of
sources of its own. Both count, for each source: loss [nats] per target, perplexity exp(loss), and bits per
byte: loss in bits over the UTF-8 bytes of the text that the targets spell, which does not depend on the
tokenizer. Every token of a document is a target but its first, which nothing precedes.
"""

import logging
import math
from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from trainer.config import ConfigError, Number, check_numbers
from trainer.data import BadDocument, Document, Source, content_hash, end_of_text_id, is_held_out
from trainer.evaluate.experts import expert_use
from trainer.evaluate.kernel import Measured
from trainer.evaluate.rows import Example, Part, packed

MAX_COMPARED = 20_000  # documents of a training source that a set is compared with, at the start
LIMITS = {
    "interval": Number(at_least=1, at_most=10**9, why="30 years at a step a second"),
    "tokens": Number(at_least=2, at_most=10**9, why="they are kept in memory"),
    "seq_len": Number(at_least=2, at_most=2**24, why="no published context is as long"),
}
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What an evaluation may make its rows of; on the rank that makes them."""

    name: str  # of the evaluation, `evaluate.<name>`
    sources: dict[str, Source]  # those of the training run, by name; one without a name: ""
    make_source: Any  # a node of the configuration -> its source
    tokenizer: Tokenizer | None
    vocab_size: int
    seq_len: int  # of the first span
    holdout: float
    max_document_mb: float


class _Sets:
    """What both have in common: the rows of some documents, and the numbers of their sums."""

    best = "loss"  # by which `checkpoint.keep_best` compares; less is better

    def __init__(self, *, interval: int, tokens: int, seq_len: int | None, at_start: bool) -> None:
        check_numbers(LIMITS, interval=interval, tokens=tokens, seq_len=seq_len or LIMITS["seq_len"].at_least)
        self.interval, self.tokens, self.seq_len, self.at_start = interval, tokens, seq_len, at_start

    def part(self, name: str, documents: Iterator[Document], material: Material, *, tokens: int) -> Part:
        """Documents in their order until so many tokens are there."""
        examples, num_bytes, num_tokens = list[Example](), 0, 0
        seq_len = self.seq_len or material.seq_len
        for document in documents:
            example, size = example_of(document, material, at_most=seq_len + 1)
            num_tokens += len(example.tokens_T)
            if len(example.tokens_T) > 1:
                examples.append(example)
                num_bytes += size
            if num_tokens >= tokens:
                break
        about = {"bytes": num_bytes, "documents": len(examples)}
        return packed(examples, name=name, seq_len=seq_len, num_groups=num_buckets(seq_len), about=about)

    def result(self, measured: Sequence[Measured]) -> dict[str, Any]:
        values = numbers(measured)
        if len(measured) > 1:
            values["by_source"] = {one.part.name: numbers([one]) for one in measured}
        values["by_position"] = by_position(measured)
        values["experts"] = expert_use(measured)
        return values


class HeldOut(_Sets):
    """Documents of the training sources that `data.holdout` sets apart, about `tokens` in all.

    interval: [steps] between two evaluations, which also take place at the end and, with at_start, before the
    first step. seq_len: of a row, null: that of the run; documents are cut at it. Raises: ConfigError.
    """

    def __init__(
        self, interval: int = 200, tokens: int = 100_000, seq_len: int | None = None, at_start: bool = True
    ) -> None:
        super().__init__(interval=interval, tokens=tokens, seq_len=seq_len, at_start=at_start)

    def parts(self, material: Material) -> list[Part]:
        if not material.holdout:
            raise ConfigError(
                f"evaluate.{material.name}: data.holdout=0.0 holds no document out; use data.holdout=0.001"
            )
        each = math.ceil(self.tokens / len(material.sources))
        parts = [
            self.part(name or material.name, held_out(source, material.holdout), material, tokens=each)
            for name, source in material.sources.items()
        ]
        for part in parts:
            refuse_empty(part, f"data.holdout={material.holdout:g} of {part.name}", "a larger data.holdout")
        return parts


class Validation(_Sets):
    """Documents of sources that are not trained on: `source`, or several `sources` by name. For the other
    arguments see HeldOut. Raises: ConfigError.
    """

    def __init__(
        self,
        source: Any = None,
        sources: Any = None,
        interval: int = 200,
        tokens: int = 100_000,
        seq_len: int | None = None,
        at_start: bool = True,
    ) -> None:
        super().__init__(interval=interval, tokens=tokens, seq_len=seq_len, at_start=at_start)
        if (source is None) == (not sources):
            raise ConfigError("give either source or sources, like {_target_: trainer.data.JsonlSource, ...}")
        self.nodes = {"": source} if source is not None else dict(sources)

    def parts(self, material: Material) -> list[Part]:
        each = math.ceil(self.tokens / len(self.nodes))
        parts = list[Part]()
        for name, node in self.nodes.items():
            source, key = material.make_source(node), f"evaluate.{material.name}.source{name and f's.{name}'}"
            warn_of_shared(source, material, key=key)
            part = self.part(name or material.name, in_order(source), material, tokens=each)
            refuse_empty(part, key, "a source with documents of two tokens or more")
            parts.append(part)
        return parts


def in_order(source: Source) -> Iterator[Document]:
    """The documents of a source, by number, each once; unusable ones are passed over."""
    for i in range(len(source)) if isinstance(source, Sized) else count():
        document = None
        with suppress(BadDocument):
            document = source[i]
        if not isinstance(source, Sized) and source.num_rows is not None and i >= source.num_rows:
            return  # it has begun again
        if document is not None:
            yield document


def held_out(source: Source, share: float) -> Iterator[Document]:
    return (document for document in in_order(source) if is_held_out(document, share=share))


def refuse_empty(part: Part, what: str, remedy: str) -> None:
    if not len(part.tokens_RL):
        raise ConfigError(f"{what}: there is no document to evaluate on; use {remedy}")


def warn_of_shared(source: Source, material: Material, *, key: str) -> None:
    """Says so if the first documents of the training sources are in a validation set, too."""
    validation = None
    for name, trained in material.sources.items():
        where = f"data.sources.{name}" if name else "data.source"
        if trained.fingerprint == source.fingerprint:
            raise ConfigError(f"{key}: is the corpus of {where}; use another one, or data.holdout")
        if validation is None:
            validation = {content_hash(document) for document in first(source)}
        shared = sum(content_hash(document) in validation for document in first(trained))
        if shared:
            log.warning(
                "%s shares %d documents with the first %d of %s: its loss is too good to be true",
                *(key, shared, MAX_COMPARED, where),
            )


def first(source: Source) -> Iterator[Document]:
    return (document for document, _ in zip(in_order(source), range(MAX_COMPARED), strict=False))


# -- rows --


def example_of(document: Document, material: Material, *, at_most: int) -> tuple[Example, int]:
    """The first tokens of a document, each with the group of its position, and the bytes of text that its
    targets spell; 0 where the source gives tokens.
    """
    if document.tokens is not None:
        mask = None if document.mask is None else torch.from_numpy(np.asarray(document.mask)[:at_most])
        return example(document.tokens[:at_most], mask), 0
    if material.tokenizer is None:
        raise ConfigError(f"evaluate.{material.name}: {document.where} is text; set data.tokenizer")
    if len(document.text.encode(errors="surrogatepass")) > 1e6 * material.max_document_mb:
        return example(np.empty(0, np.int64)), 0
    encoding = material.tokenizer.encode(document.text, add_special_tokens=False)
    ids = [*encoding.ids, end_of_text_id(material.tokenizer)][:at_most]
    if len(ids) < 2:
        return example(np.array(ids, np.int64)), 0
    last = min(len(encoding.ids), at_most) - 1
    start, end = encoding.offsets[min(1, last)][0], encoding.offsets[last][1]
    num_bytes = len(document.text[start:end].encode(errors="surrogatepass")) if last else 0
    return example(np.array(ids, np.int64)), num_bytes


def example(ids: np.ndarray, mask_T: torch.Tensor | None = None) -> Example:
    """mask_T: False where the token is not to be predicted."""
    tokens_T = torch.from_numpy(ids.astype(np.int64))
    groups_T = bucket(torch.arange(len(tokens_T)))
    return Example(tokens_T, groups_T if mask_T is None else torch.where(mask_T, groups_T, -1))


def bucket(position_T: torch.Tensor) -> torch.Tensor:
    """Number b holds the positions 2^b to 2^(b+1) - 1 of a document. Position 0 has none: nothing precedes
    it.
    """
    return position_T.double().clamp_min(0.5).log2().floor().long()


def num_buckets(seq_len: int) -> int:
    return int(math.log2(seq_len)) + 1


# -- numbers --


def numbers(measured: Sequence[Measured]) -> dict[str, Any]:
    loss, targets, hits = (
        math.fsum(x for one in measured for x in getattr(one, name).tolist())
        for name in ("loss_G", "targets_G", "hits_G")
    )
    num_bytes = sum(one.part.about["bytes"] for one in measured)
    mean = loss / max(targets, 1)
    values = {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": hits / max(targets, 1)}
    if num_bytes:
        values["bits_per_byte"] = loss / math.log(2) / num_bytes
    return values | {
        "targets": int(targets),
        "documents": sum(one.part.about["documents"] for one in measured),
    }


def by_position(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Does context help? The mean loss of targets by their position in their document."""
    loss_G, targets_G = (sum(getattr(one, name) for one in measured) for name in ("loss_G", "targets_G"))
    return [
        {"from": 2**b, "to": 2 ** (b + 1) - 1, "loss": (loss / targets).item(), "targets": int(targets)}
        for b, (loss, targets) in enumerate(zip(loss_G, targets_G, strict=True))
        if targets
    ]
