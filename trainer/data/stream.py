"""How do documents become rows of tokens: the same rows on any number of ranks and workers, and after any
restart?

    sources --reader--> document n --intake--> tokens --virtual stream v--> rows --rank r--> tokens_BL,
    (files,  (order,     (in workers: text     (ids and   (opener, buffer,       (its        labels_BL,
     hub)     retries)    to tokens, ahead)     mask)      mixture, rows)         streams)   positions_BL

The order is arithmetic, so there is little to save. A virtual stream (virtual.py) draws on the sources by
their weights (mixture.py), opens their documents (opener.py), keeps some of them open (buffer.py) and fills
rows from them (rows.py); a global batch takes G / V rows from each stream. If there are fewer rows than
streams, the streams serve in turns: in turn t of V / G those whose number is t mod V / G, a row each. A rank
owns V / R neighbouring streams, and G / R of them serve in each turn: a global batch does not depend on R.
Workers only read and tokenise, ahead of time (intake.py, workers.py): a global batch does not depend on them
either. The state (state.py) holds read heads and no tokens.

Memory: of each stream, 2 b open documents (4 bytes a token) with their batches, and ahead of it, with
workers, those of the next `prefetch` steps and of one refill (b). No more is asked for until some was used.

Letters: B rows of a microbatch, L tokens of a row, T tokens of one stream in one step, G rows of an optimizer
step (the global batch), V virtual streams (not the vocabulary; of a rank in shapes), R data-parallel ranks, S
sources, C slots of a buffer.
Units: offsets and lengths in tokens, `_mb` in 10^6 bytes of UTF-8, lines and rows of a file counted from 1.
"""

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from tokenizers import Tokenizer

from trainer.config import divisors
from trainer.data.encoder import Encoder
from trainer.data.holdout import HELD_OUT
from trainer.data.intake import RESUMED, Intake, Wanted
from trainer.data.lengths import NOT_DRAWN, LengthBias
from trainer.data.opener import Opener
from trainer.data.reader import DataError, Reader
from trainer.data.rows import IGNORED, Pieces, write
from trainer.data.sources import BAD_KINDS, BadDocument, Source
from trainer.data.state import Snapshot, StreamState, positions, refuse_foreign
from trainer.data.tokenizer import end_of_text_id
from trainer.data.virtual import StreamSettings, VirtualStream

FEW_BAD = 10  # documents that say nothing about a corpus
# Since the start of the run. documents: read to their ends; tokens: delivered, without padding; open:
# tokens of opened documents that are still to be delivered; held_out: documents passed over for evaluations,
# not_drawn: for their lengths. A state from before the last ones were counted lacks them.
READ = ("documents", "tokens", "open", "padding", "truncated")
COUNTED = (*READ, *BAD_KINDS[:6], HELD_OUT, NOT_DRAWN, *BAD_KINDS[6:])
PACKINGS = {"stream": VirtualStream.concatenate, "fit": VirtualStream.best_fit}


class Batch(NamedTuple):
    """One microbatch, int64. A label is the next token of its document, or IGNORED where the document's
    mask says so; positions restart with each piece of a document, and so does attention; without
    `document_mask` with each row only.
    """

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor


class SourcedBatch(NamedTuple):
    """A Batch that also says which source each token is from: its number in the order of names."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor
    sources_BL: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What the rows of a run are; the same on all ranks.

    seq_len, global_batch, mixture, buffer: of the first span, until `TokenStream.set` changes them.
    packing: "stream" cuts documents at the ends of rows and reads on in a later row; "fit" never does, and
    pads.
    at_end: "repeat" begins another epoch; "stop" pads when all is read, and `has_more` says so.
    epochs: how often "stop" reads all.
    holdout: the share of the documents that is passed over (holdout.py).
    length_bias: which documents are drawn by their length, by the names of sources, "source" where there is
    one (lengths.py).
    with_sources: batches are SourcedBatches. retry_s [s], prefetch [steps]: see Reader and read_ahead.
    """

    seq_len: int
    global_batch: int
    num_streams: int
    seed: int
    mixture: dict[str, float] | None = None
    buffer: int = 0
    packing: Literal["stream", "fit"] = "stream"
    at_end: Literal["repeat", "stop"] = "repeat"
    epochs: int = 1
    shuffle: bool = True
    document_mask: bool = True
    on_bad: Literal["skip", "fatal"] = "skip"
    max_bad: float = 1.0
    max_document_mb: float = 100.0
    holdout: float = 0.0
    length_bias: dict[str, LengthBias] = field(default_factory=dict)
    backend: str = "tokenizers"
    workers: int = 0
    prefetch: int = 4
    retries: int = 4
    retry_s: float = 1.0
    with_sources: bool = False


class TokenStream:
    """The rows of one rank, step after step. `source`: one, or several by name."""

    def __init__(
        self,
        config: StreamConfig,
        *,
        source: Source | dict[str, Source],
        tokenizer: Tokenizer | None,
        rank: int = 0,
        num_ranks: int = 1,
        report: Callable[[BadDocument], None] = lambda bad: None,
    ) -> None:
        self.config, self.num_ranks, self.tokenizer, self.report = config, num_ranks, tokenizer, report
        self.names = sorted(source) if isinstance(source, dict) else []
        self.set(
            seq_len=config.seq_len,
            global_batch=config.global_batch,
            mixture=config.mixture,
            buffer=config.buffer,
        )
        self.batch = SourcedBatch if config.with_sources else Batch
        self.totals = Counter[str]()
        self.step_tokens = 0  # tokens of this rank's last step that are no padding
        self.step_withheld = 0  # labels of it that masks take away
        sources = {f"data.sources.{name}": source[name] for name in self.names} or {"data.source": source}
        self.readers = [reader_of(config, key, part) for key, part in sources.items()]
        self.intake = Intake(
            self.readers,
            encode=Encoder(tokenizer, backend=config.backend) if tokenizer else None,
            end_of_text=end_of_text_id(tokenizer) if tokenizer else None,
            max_document_mb=config.max_document_mb,
            holdout=config.holdout,
            workers=config.workers,
        )
        # ends the workers, at the latest with the interpreter
        self.close = weakref.finalize(self, self.intake.close)
        owned = self.num_streams // num_ranks
        self.streams = range(rank * owned, (rank + 1) * owned)
        self.virtual = [self.virtual_stream(number) for number in self.streams]
        self.begin()
        self.read_ahead(config.prefetch)

    @property
    def may_mask(self) -> bool:
        """Does any source say that its documents have masks? The same on all ranks."""
        return any(reader.masks for reader in self.readers)

    @property
    def num_streams(self) -> int:
        return self.config.num_streams

    def virtual_stream(self, number: int) -> VirtualStream:
        opener = Opener(number=number, num_streams=self.num_streams, intake=self.intake, refuse=self.refuse)
        return VirtualStream(opener=opener, seed=self.config.seed, totals=self.totals)

    def set(
        self,
        *,
        seq_len: int,
        global_batch: int,
        mixture: dict[str, float] | None,
        buffer: int,
        phase: int = 0,
        drain: bool = False,
        turn: int = 0,
    ) -> None:
        """Rows of another length, or another number of them; other weights of the sources (none: equal),
        another buffer: from the next step on. The streams read on where they are, or first to the ends of
        open documents (`drain`). turn: a count of steps, for streams that serve in turns."""
        check_split(global_batch=global_batch, num_streams=self.num_streams, num_ranks=self.num_ranks)
        num_turns = max(1, self.num_streams // global_batch)
        names = self.names or [""]
        weights = mixture or dict.fromkeys(names, 1.0)
        unknown = sorted(set(weights) - set(names))
        if unknown:
            raise ValueError(f"mixture={mixture}: there is no source {', '.join(unknown)}")
        total = math.fsum(weights.values())
        weights_S = [weights.get(name, 0.0) / total for name in names]
        self.now = StreamSettings(
            seq_len=seq_len,
            rows_per_stream=max(1, global_batch // self.num_streams),
            weights_S=weights_S,
            size_S=[math.ceil(buffer * weight) for weight in weights_S],
            phase=phase,
            drain=drain,
            num_turns=num_turns,
            turn=turn % num_turns,
            cut=seq_len if self.config.packing == "fit" else sys.maxsize,
        )

    def begin(self) -> None:
        """After a start: tells sources that only read forward where to begin, and requests what was open
        before a resume.
        """
        self.ahead_of: StreamSettings | None = None  # for whose steps enough was requested
        open_documents = [(s, n, stream) for stream in self.virtual for s, n, _, _ in stream.open()]
        for s, reader in enumerate(self.readers):
            if reader.num_documents is None:
                unread = {n for source, n, _ in open_documents if source == s}
                self.intake.seek(
                    s, {stream.number: stream.opener.next_S[s] for stream in self.virtual}, unread
                )
        if self.intake.workers.num:
            open_documents.sort(key=lambda entry: entry[:2])  # the order of a source that reads forward
            wanted = [Wanted(s, range(n, n + 1)) for s, n, _ in open_documents]
            tickets = self.intake.request(wanted, priority=RESUMED)
            for (s, n, stream), [ticket] in zip(open_documents, tickets, strict=True):
                stream.resumed[s, n] = ticket

    # -- rows --

    def next_step(self, micro_batch: int) -> list[Batch | SourcedBatch]:
        """This rank's rows of the next optimizer step, in microbatches of `micro_batch` rows. Raises:
        BadDocument, DataError.
        """
        now, config, has_workers = self.now, self.config, bool(self.intake.workers.num)
        serving = [stream for stream in self.virtual if now.steps_until(stream.number) == 0]
        num_rows = len(serving) * now.rows_per_stream
        if num_rows % micro_batch:
            message = f"micro_batch={micro_batch} does not divide the {num_rows} rows of a rank"
            raise ValueError(f"{message}; use one of {divisors(num_rows)}")
        self.step_tokens, before = 0, self.totals["tokens"]
        if self.ahead_of is not now:
            # where nothing is read before it is wanted, the second step is for streams of short documents
            self.read_ahead(config.prefetch if has_workers else 2)
        pieces, pack = Pieces(), PACKINGS[config.packing]
        for stream in serving:
            pack(stream, pieces, now)
        planes, self.step_withheld = write(
            pieces, document_mask=config.document_mask, seq_len=now.seq_len, with_sources=config.with_sources
        )
        if has_workers:
            self.read_ahead(config.prefetch)
            self.ahead_of = now
        self.step_tokens = self.totals["tokens"] - before
        planes_BL = [plane_T.reshape(num_rows, now.seq_len) for plane_T in planes]
        parts = [slice(start, start + micro_batch) for start in range(0, num_rows, micro_batch)]
        return [self.batch(*(torch.from_numpy(plane_BL[part]) for plane_BL in planes_BL)) for part in parts]

    def blank_step(self, micro_batch: int) -> list[Batch | SourcedBatch]:
        """Rows of the same shape with nothing to learn, for a rank that has none while others have."""
        shape_BL = (micro_batch, self.now.seq_len)
        num_micro = len(self.streams) // self.now.num_turns * self.now.rows_per_stream // micro_batch
        labels_BL, *others = (torch.full(shape_BL, value) for value in (IGNORED, 0, 0, 0))
        return [self.batch(others[0], labels_BL, *others[1 : len(self.batch._fields) - 1])] * num_micro

    def has_more(self) -> bool:
        """Is there another token for this rank? Always, unless `at_end` is "stop"."""
        return self.intake.repeats or any(stream.has_more(self.now) for stream in self.virtual)

    def read_ahead(self, steps: int) -> None:
        """Requests the documents of so many steps that were not requested, those of all streams together, the
        next to serve first.
        """
        now, goal, wanted, openers = self.now, cache(self.goal), list[Wanted](), list[Opener]()
        for until, stream in sorted(
            ((now.steps_until(v.number), v) for v in self.virtual), key=itemgetter(0)
        ):
            if until < steps:
                shortfall = stream.opener.shortfall(goal(-((until - steps) // now.num_turns)))
                wanted += shortfall
                openers += [stream.opener] * len(shortfall)
        for opener, part, tickets in zip(openers, wanted, self.intake.request(wanted), strict=True):
            opener.append(part.source, tickets)

    def goal(self, steps: int) -> list[int]:
        """[documents] That a stream opens in so many steps of its own, by source, about."""
        now, goal_S = self.now, list[int]()
        for s, weight in enumerate(now.weights_S):
            num_documents = steps * now.num_tokens * weight / self.intake.mean_length(s)
            refill = self.intake.to_request(s, now.size_S[s])
            goal_S.append(math.ceil(num_documents + refill))
        return goal_S

    def refuse(self, bad: BadDocument) -> None:
        config = self.config
        if bad.kind in (HELD_OUT, NOT_DRAWN):  # nothing is wrong with it
            self.totals[bad.kind] += 1
            return
        if config.on_bad == "fatal":
            bad.add_note("data.on_bad=skip counts and reports such documents, and goes on")
            raise bad
        self.totals[bad.kind] += 1
        self.report(bad)
        num_bad = sum(self.totals[kind] for kind in BAD_KINDS if kind != "empty")
        num_read = num_bad + self.totals["documents"]
        if num_bad > max(FEW_BAD, config.max_bad * num_read):
            raise DataError(
                f"{num_bad} of {num_read} documents were bad, the last was {bad}; data.max_bad="
                f"{config.max_bad:g} of them may be, bad_documents.*.txt lists them"
            )

    # -- state --

    @property
    def fingerprint(self) -> str | dict[str, str]:
        """Of the corpus: one, or that of each source."""
        prints = [reader.source.fingerprint for reader in self.readers]
        return dict(zip(self.names, prints, strict=True)) if self.names else prints[0]

    @property
    def counts(self) -> dict[str, int]:
        """What this rank has read since the start of the run, and the epoch its slowest stream is in, of the
        source most read.
        """
        oldest_S = [min(stream.oldest(s) for stream in self.virtual) for s in range(len(self.readers))]
        epoch = max(reader.epoch(n) for reader, n in zip(self.readers, oldest_S, strict=True))
        return {"epoch": epoch, **{name: self.totals[name] for name in COUNTED}}

    @property
    def state_counts(self) -> list[int]:
        """In the order of COUNTED. Their sum over all ranks is that of the run, before and after a resume."""
        return [self.totals[name] for name in COUNTED]

    @property
    def open_documents(self) -> tuple[int, int]:
        """How many there are on this rank, and how many of their tokens were delivered."""
        read = [read for stream in self.virtual for _, _, read, _ in stream.open()]
        return len(read), sum(read)

    def snapshot(self) -> Snapshot:
        """Where the stream is now, for a later `state_dict`; cheap enough to be taken in every step."""
        return Snapshot(
            positions_V=[stream.position() for stream in self.virtual],
            counts=self.state_counts,
            num_streams=self.num_streams,
        )

    def state_dict(self) -> StreamState:
        """Where the stream is now, as tensors: see Snapshot."""
        return self.snapshot().state_dict()

    def load_state_dict(self, state: StreamState, *, keep_counts: bool) -> None:
        """Goes on from this rank's part of a state. `keep_counts` on one rank only, for their sum to stay
        right. Raises: ValueError if the state is not one of these streams.
        """
        refuse_foreign(
            state,
            streams=self.streams,
            num_streams=self.num_streams,
            num_ranks=self.num_ranks,
            num_sources=len(self.readers),
        )
        self.intake.forget()
        self.totals.clear()
        if keep_counts:
            self.totals.update(dict(zip(COUNTED, state["counts"].tolist(), strict=False)))
        positions_V = positions(state, streams=self.streams, num_streams=self.num_streams)
        for stream, position in zip(self.virtual, positions_V, strict=True):
            stream.start_at(position)
        self.begin()


def reader_of(config: StreamConfig, key: str, source: Source) -> Reader:
    return Reader(
        source,
        key=key,
        seed=config.seed,
        shuffle=config.shuffle,
        num_streams=config.num_streams,
        repeat=config.at_end == "repeat",
        epochs=config.epochs,
        bias=config.length_bias.get(key.removeprefix("data.sources.").removeprefix("data.")),
        retries=config.retries,
        wait_s=config.retry_s,
    )


def check_split(*, global_batch: int, num_streams: int, num_ranks: int) -> None:
    """Each stream serves the same number of rows, or one in its turn; each rank has the same number of
    streams, and of rows.
    """
    is_even = global_batch % num_streams == 0 or num_streams % global_batch == 0
    if not is_even or num_streams % num_ranks or global_batch % num_ranks:
        choices = [d for d in divisors(global_batch) if d % num_ranks == 0]
        remedy = f"num_streams from {choices}" if choices else f"a global_batch that {num_ranks} divides"
        message = f"num_streams={num_streams} must divide global_batch={global_batch} or be a multiple of it"
        raise ValueError(f"{message}, and be a multiple of the {num_ranks} data-parallel ranks; use {remedy}")
