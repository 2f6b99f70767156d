"""How do documents become rows of tokens: the same rows on any number of ranks and workers, and after any
restart?

    sources --reader--> document n --intake--> tokens --virtual stream v--> rows --rank r--> tokens_BL,
    labels_BL, (files,   (order,    (in workers: text     (uint32)   (mixed, buffered,     (its streams)
    positions_BL
     hub)      retries)   to tokens, ahead)                packed)

The order is arithmetic, so there is little to save. A virtual stream draws on the sources by their weights
(mixture.py), keeps some documents open (buffer.py) and fills rows from them (virtual.py); a global batch
takes G / V rows from each stream. A rank owns V / R neighbouring streams: a global batch does not depend on
R. Workers only read and tokenise, ahead of time (intake.py, workers.py): it does not depend on them either.
The state holds read heads and no tokens.

Memory: of each stream, 2 b open documents (4 bytes a token), and ahead of it, with workers, those of the next
`prefetch` steps and of one refill (b). No more is asked for until some of it was used.

Letters: B rows of a microbatch, L tokens of a row, T tokens of one stream in one step, G rows of an optimizer
step (the global batch), V virtual streams (not the vocabulary; of a rank in shapes), R data-parallel ranks, S
sources, C slots of a buffer.
Units: offsets and lengths in tokens, `_mb` in 10^6 bytes of UTF-8, lines and rows of a file counted from 1.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from trainer.config import divisors
from trainer.data.encoder import Encoder
from trainer.data.intake import AGAIN, Intake
from trainer.data.reader import DataError, Reader
from trainer.data.sources import BAD_KINDS, BadDocument, Source
from trainer.data.tokenizer import end_of_text_id
from trainer.data.virtual import BEYOND, IGNORED, Settings, VirtualStream

# Since the start of the run. documents: read to their ends; open: tokens of opened documents that are still
# to be delivered.
FEW_BAD = 10  # documents that say nothing about a corpus
StreamState = dict[str, torch.Tensor]
COUNTED = ("documents", "tokens", "open", "padding", "truncated", *BAD_KINDS)


class Batch(NamedTuple):
    """One microbatch, int64. A label is the next token of its document; positions restart with each piece of
    a document, and so does attention; without `document_mask` with each row only."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor


class SourcedBatch(NamedTuple):
    """A Batch that also says which source each token is from: its number in the order of names."""

    tokens_BL: torch.Tensor
    labels_BL: torch.Tensor
    positions_BL: torch.Tensor
    sources_BL: torch.Tensor


class TokenStream:
    """The rows of one rank, step after step. `source`: one, or several by name.

    packing: "stream" cuts documents at the ends of rows and reads on in a later row; "fit" never does, and
    pads. at_end: "repeat" begins another epoch; "stop" pads when all is read, and `has_more` says so.
    """

    def __init__(
        self,
        *,
        source: Source | dict[str, Source],
        tokenizer: Tokenizer | None,
        seq_len: int,
        global_batch: int,
        num_streams: int,
        seed: int,
        rank: int,
        num_ranks: int,
        shuffle: bool = True,
        on_bad: Literal["skip", "fatal"] = "skip",
        max_bad: float = 1.0,
        max_document_mb: float = 100.0,
        document_mask: bool = True,
        report: Callable[[BadDocument], None] = lambda bad: None,
        mixture: dict[str, float] | None = None,
        buffer: int = 0,
        packing: Literal["stream", "fit"] = "stream",
        at_end: Literal["repeat", "stop"] = "repeat",
        backend: str = "tokenizers",
        workers: int = 0,
        prefetch: int = 4,
        retries: int = 4,
        retry_s: float = 1.0,
        with_sources: bool = False,
    ) -> None:
        self.num_streams, self.num_ranks = num_streams, num_ranks
        self.names = sorted(source) if isinstance(source, dict) else []
        sources = {f"data.sources.{name}": source[name] for name in self.names} or {"data.source": source}
        self.set(seq_len=seq_len, global_batch=global_batch, mixture=mixture, buffer=buffer)
        self.tokenizer, self.packing, self.batch = tokenizer, packing, SourcedBatch if with_sources else Batch
        self.on_bad, self.max_bad, self.report, self.totals, self.prefetch = (
            on_bad,
            max_bad,
            report,
            Counter[str](),
            prefetch,
        )
        order = {"seed": seed, "shuffle": shuffle, "num_streams": num_streams, "repeat": at_end == "repeat"}
        self.readers = [
            Reader(of, key=key, retries=retries, wait_s=retry_s, **order) for key, of in sources.items()
        ]
        owned = num_streams // num_ranks
        self.streams = range(rank * owned, (rank + 1) * owned)
        self.intake = Intake(
            self.readers,
            encode=Encoder(tokenizer, backend=backend) if tokenizer else None,
            end_of_text=end_of_text_id(tokenizer) if tokenizer else None,
            max_document_mb=max_document_mb,
            workers=workers,
        )
        # ends the workers, at the latest with the interpreter
        self.close = weakref.finalize(self, self.intake.close)
        of_all = {
            "num_streams": num_streams,
            "intake": self.intake,
            "seed": seed,
            "totals": self.totals,
            "refuse": self.refuse,
        }
        self.virtual = [VirtualStream(number=v, document_mask=document_mask, **of_all) for v in self.streams]
        self.follow()
        self.read_ahead(self.prefetch)

    def set(
        self,
        *,
        seq_len: int,
        global_batch: int,
        mixture: dict[str, float] | None,
        buffer: int,
        phase: int = 0,
        drain: bool = False,
    ) -> None:
        """Rows of another length, or another number of them; other weights of the sources (none: equal),
        another buffer: from the next step on. The streams read on where they are, or first to the ends of
        open documents (`drain`)."""
        check_split(global_batch=global_batch, num_streams=self.num_streams, num_ranks=self.num_ranks)
        given = mixture or dict.fromkeys(self.names or [""], 1.0)
        if unknown := set(given) - set(self.names or [""]):
            raise ValueError(f"mixture={mixture}: there is no source {', '.join(sorted(unknown))}")
        total = math.fsum(given.values())
        weights_S = [given.get(name, 0.0) / total for name in self.names or [""]]
        self.now = Settings(
            seq_len=seq_len,
            rows_per_stream=global_batch // self.num_streams,
            weights_S=weights_S,
            size_S=[math.ceil(buffer * weight) for weight in weights_S],
            phase=phase,
            drain=drain,
        )

    def follow(self) -> None:
        """After a start: tells sources that only read forward where to begin, and asks for what was open
        before a resume.
        """
        open_documents = [(stream, (d.source, d.n)) for stream in self.virtual for d in stream.open()]
        for s, reader in enumerate(self.readers):
            if reader.num_documents is None:
                unread = {n for _, (source, n) in open_documents if source == s}
                self.intake.follow(s, {stream.number: stream.next_S[s] for stream in self.virtual}, unread)
        if self.intake.workers.num:
            open_documents.sort(key=lambda of: of[1])  # the order of a source that reads forward
            pending = self.intake.request([wanted for _, wanted in open_documents], priority=AGAIN)
            for (stream, wanted), document in zip(open_documents, pending, strict=True):
                stream.again[wanted] = document

    # -- rows --

    def next_step(self, micro_batch: int) -> list[Batch | SourcedBatch]:
        """This rank's rows of the next optimizer step, in microbatches of `micro_batch` rows. Raises:
        BadDocument, DataError.
        """
        now, num_rows = self.now, len(self.streams) * self.now.rows_per_stream
        if num_rows % micro_batch:
            given = f"micro_batch={micro_batch} does not divide the {num_rows} rows of a rank"
            raise ValueError(f"{given}; use one of {divisors(num_rows)}")
        self.read_ahead(self.prefetch if self.intake.workers.num else 1)
        rows_NVT = np.empty((len(self.batch._fields), len(self.streams), now.num_tokens), np.int64)
        for stream, rows_NT in zip(self.virtual, rows_NVT.swapaxes(0, 1), strict=True):
            (stream.fit if self.packing == "fit" else stream.fill)(rows_NT, now)
        if self.intake.workers.num:
            self.read_ahead(self.prefetch)
        rows_NBL = torch.from_numpy(rows_NVT.reshape(-1, num_rows, now.seq_len))
        return list(map(self.batch, *(rows_BL.split(micro_batch) for rows_BL in rows_NBL)))

    def blank_step(self, micro_batch: int) -> list[Batch | SourcedBatch]:
        """Rows of the same shape with nothing to learn, for a rank that has none while others have."""
        shape_BL = (micro_batch, self.now.seq_len)
        num_micro = len(self.streams) * self.now.rows_per_stream // micro_batch
        labels_BL, *others = (torch.full(shape_BL, value) for value in (IGNORED, 0, 0, 0))
        return [self.batch(others[0], labels_BL, *others[1 : len(self.batch._fields) - 1])] * num_micro

    def has_more(self) -> bool:
        """Is there another token for this rank? Always, unless `at_end` is "stop"."""
        return self.intake.repeats or any(stream.has_more(self.now) for stream in self.virtual)

    def read_ahead(self, steps: int) -> None:
        """Asks for the documents of so many steps that were not asked for, those of all streams together."""
        now = self.now
        means_S = map(self.intake.mean_length, range(len(self.readers)))
        each = zip(now.weights_S, means_S, now.size_S, strict=True)  # size: what the next refill takes
        goal_S = [math.ceil(steps * now.num_tokens * weight / mean + size) for weight, mean, size in each]
        missing = [(stream, wanted) for stream in self.virtual if (wanted := stream.missing(goal_S))]
        pending = iter(self.intake.request(wanted for _, of_stream in missing for wanted in of_stream))
        for stream, wanted in missing:
            stream.asked(wanted, islice(pending, len(wanted)))

    def refuse(self, bad: BadDocument) -> None:
        if self.on_bad == "fatal":
            bad.add_note("data.on_bad=skip counts and reports such documents, and goes on")
            raise bad
        self.totals[bad.kind] += 1
        self.report(bad)
        num_bad = sum(self.totals[kind] for kind in BAD_KINDS if kind != "empty")
        if num_bad > max(FEW_BAD, self.max_bad * (num_bad + self.totals["documents"])):
            given = (
                f"{num_bad} of {num_bad + self.totals['documents']} documents were bad, the last was {bad}"
            )
            raise DataError(
                f"{given}; data.max_bad={self.max_bad:g} of them may be, bad_documents.*.txt lists them"
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
        slowest = [min(stream.slowest(s) for stream in self.virtual) for s in range(len(self.readers))]
        epoch = max(reader.epoch(n) for reader, n in zip(self.readers, slowest, strict=True))
        return {"epoch": epoch, **{name: self.totals[name] for name in COUNTED}}

    @property
    def state_counts(self) -> list[int]:
        """In the order of COUNTED. Their sum over all ranks is that of the run, before and after a resume."""
        return [self.totals[name] for name in COUNTED]

    @property
    def open_documents(self) -> tuple[int, int]:
        """How many there are on this rank, and how many of their tokens were delivered."""
        read = [document.read for stream in self.virtual for document in stream.open()]
        return len(read), sum(read)

    def state_dict(self) -> StreamState:
        """This rank's part. The state of the run has the streams of all ranks in their order, with equal
        slots (`with_slots`), and the sum of the counts. 9 bytes for each open document.

        index_VC: of a document in its stream's share of its source; -1: an empty slot, -2: none.
        """
        num_slots = max(1, *(stream.num_slots for stream in self.virtual))
        heads_V3C = np.stack([stream.heads(num_slots) for stream in self.virtual])
        return {
            "next_VS": torch.tensor([stream.next_S for stream in self.virtual]),
            "credit_VS": torch.tensor(
                [stream.credits.credit_S for stream in self.virtual], dtype=torch.float64
            ),
            "draws_VS": torch.tensor(
                [[buffer.draws for buffer in stream.buffer_S] for stream in self.virtual]
            ),
            "phase_V": torch.tensor([stream.phase for stream in self.virtual]),
            "index_VC": torch.from_numpy(narrowed(heads_V3C[:, 0], np.int32)),
            "read_VC": torch.from_numpy(narrowed(heads_V3C[:, 1], np.int32)),
            "source_VC": torch.from_numpy(narrowed(heads_V3C[:, 2], np.uint8)),
            "counts": torch.tensor(self.state_counts),
        }

    def load_state_dict(self, state: dict[str, torch.Tensor], *, keep_counts: bool) -> None:
        """Goes on from this rank's part of a state. `keep_counts` on one rank only, for their sum to stay
        right.
        """
        self.check(state)
        self.intake.forget()
        counts = state["counts"].tolist() if keep_counts else [0] * len(COUNTED)
        self.totals.clear()
        self.totals.update(dict(zip(COUNTED, counts, strict=True)))
        heads_V3C = np.stack(
            [state[name].numpy().astype(np.int64) for name in ("index_VC", "read_VC", "source_VC")], axis=1
        )
        names = ("next_VS", "credit_VS", "draws_VS", "phase_V")
        parts = (*(state[name].tolist() for name in names), heads_V3C)
        for stream, next_S, credit_S, draws_S, phase, heads_3C in zip(self.virtual, *parts, strict=True):
            stream.restore(next_S, credit_S=credit_S, draws_S=draws_S, phase=phase, heads_3C=heads_3C)
        self.follow()

    def check(self, state: dict[str, torch.Tensor]) -> None:
        """Raises: ValueError if the state is not one of these streams."""
        num_rows, num_sources = state["next_VS"].shape
        if num_rows != len(self.streams):
            found = num_rows * self.num_ranks
            raise ValueError(
                f"the checkpoint has {found} streams, this run {self.num_streams}; use "
                f"data.num_streams={found}"
            )
        if num_sources != len(self.readers):
            raise ValueError(
                f"the checkpoint has {num_sources} sources, this run {len(self.readers)}; set "
                "data.sources back"
            )
        number_V1 = torch.arange(self.streams.start, self.streams.stop)[:, None]
        next_VS, index_VC, source_VC = state["next_VS"], state["index_VC"].long(), state["source_VC"].long()
        own = (
            (next_VS % self.num_streams == number_V1).all()
            and (next_VS >= 0).all()
            and (source_VC < num_sources).all()
        )
        is_behind = own and (number_V1 + index_VC * self.num_streams < next_VS.gather(1, source_VC)).all()
        if (
            not is_behind
            or (index_VC < BEYOND).any()
            or (state["read_VC"] < 0).any()
            or (state["draws_VS"] < 0).any()
        ):
            raise ValueError(
                f"the state is not that of streams {self.streams.start} to {self.streams.stop - 1} of "
                "this run"
            )


def with_slots(state: StreamState, *, num_slots: int) -> StreamState:
    """A rank's state with room for so many open documents, as they must be equal on all ranks."""
    missing = num_slots - state["index_VC"].shape[1]
    fill = {"index_VC": BEYOND, "read_VC": 0, "source_VC": 0}
    wide = {
        name: torch.nn.functional.pad(state[name], (0, missing), value=value) for name, value in fill.items()
    }
    return {**state, **wide}


def narrowed(values: np.ndarray, dtype: type) -> np.ndarray:
    if values.size and values.max() > np.iinfo(dtype).max:
        raise OverflowError(f"{values.max()} does not fit the state's {np.dtype(dtype).name}")
    return values.astype(dtype)


def check_split(*, global_batch: int, num_streams: int, num_ranks: int) -> None:
    """Each stream serves the same number of rows, each rank the same number of streams."""
    if global_batch % num_streams or num_streams % num_ranks:
        choices = [d for d in divisors(global_batch) if d % num_ranks == 0]
        remedy = f"num_streams from {choices}" if choices else f"a global_batch that {num_ranks} divides"
        given = f"num_streams={num_streams} must divide global_batch={global_batch}"
        raise ValueError(f"{given} and be a multiple of the {num_ranks} data-parallel ranks; use {remedy}")
