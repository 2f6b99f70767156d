"""How alike are the batches that a stream delivers, with and without the document buffer? Statistics of rows,
without training.

    python -m benchmarks.heterogeneity [docs/benchmarks/heterogeneity.svg]       (1.5 minutes)

The picture needs matplotlib.

Documents of lognormal lengths in 8 domains. A token's loss is made up: its domain's level + its document's
offset + a trend along the document [nats]. A token's value is its place in the corpus, so what a row holds is
read off the rows that `TokenStream.next_step` returns. All arms read the same corpus from its start;
statistics are of the second half of the steps.

Letters: R rows delivered, M microbatches of B rows in a step, D domains, P pieces of documents in rows, N
documents.
"""

import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from trainer.data import Document, StreamConfig, TokenStream
from trainer.lab.intervals import estimate

SEQ_LEN, ROWS, MICRO = 8192, 32, 4  # of a row, of a step, of a microbatch
STEPS, SEEDS, TOGETHER = 1000, 5, 10  # the last: steps whose mean is taken
# [tokens]; of a document, of the logarithm, of the corpus at least
MEAN_LENGTH, SIGMA, TOTAL = 5000, 1.8, 420_000_000
LEVEL_D = np.linspace(1.5, 3.5, 8)  # [nats] of a domain
OFFSET, TREND = 0.3, 0.3  # [nats] a document's, as a standard deviation; what it falls by from start to end
SPANS = (0, 10, 20, 40, 80, 160, 262)  # [10^6 tokens delivered]
ARMS = {  # virtual streams, buffer of each
    "sequential, 1 stream": (1, 0),
    "sequential, 8 streams": (8, 0),  # one for each microbatch, as a rank has its loader in the report
    "sequential, 32 streams": (32, 0),  # one for each row: our default
    "RSDB 1024, 1 stream": (1, 1024),
    "RSDB 128, 8 streams": (8, 128),
    "RSDB 32, 32 streams": (32, 32),
    "RSDB 8, 32 streams": (32, 8),
    "RSDB 1, 32 streams": (32, 1),
}
SHUFFLED = "shuffled rows"
COMPARED = [
    ("RSDB 128, 8 streams", "sequential, 8 streams"),
    ("RSDB 32, 32 streams", "sequential, 8 streams"),
    ("sequential, 32 streams", "sequential, 8 streams"),
    ("RSDB 1024, 1 stream", "sequential, 1 stream"),
    ("RSDB 32, 32 streams", "sequential, 32 streams"),
    ("RSDB 8, 32 streams", "sequential, 32 streams"),
]
DRAWN = [arm for arm in ARMS if arm not in ("RSDB 1024, 1 stream", "RSDB 8, 32 streams")]
TRACED = ("sequential, 8 streams", "RSDB 32, 32 streams")


class Corpus:
    """Its tokens are numbered through."""

    fingerprint = "heterogeneity"

    def __init__(self, *, seed: int) -> None:
        random = np.random.default_rng(seed)
        num_documents = int(1.05 * TOTAL / MEAN_LENGTH)
        length_N = (
            random.lognormal(np.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA, num_documents).astype(np.int64) + 1
        )
        end_N = length_N.cumsum()
        keep = min(num_documents, int(np.searchsorted(end_N, TOTAL)))
        self.length_N, self.start_N = length_N[:keep], (end_N - length_N)[:keep]
        self.domain_N, self.offset_N = (
            random.integers(len(LEVEL_D), size=keep),
            OFFSET * random.standard_normal(keep),
        )
        self.share_D = np.bincount(self.domain_N, self.length_N, len(LEVEL_D)) / self.length_N.sum()
        self.is_long_N = self.length_N >= np.quantile(self.length_N, 0.9)
        self.share_long = self.length_N[self.is_long_N].sum() / self.length_N.sum()

    def __len__(self) -> int:
        return len(self.length_N)

    def __getitem__(self, i: int) -> Document:
        start = self.start_N[i]
        return Document("corpus", tokens=NUMBERS[start : start + self.length_N[i]])


NUMBERS = np.arange(TOTAL, dtype=np.uint32)


@dataclass
class Rows:
    """What was in the rows that were delivered."""

    loss_R: np.ndarray  # mean over the row
    share_RD: np.ndarray  # of the domains
    long_R: np.ndarray  # share of tokens from the longest tenth of the documents
    row_P: np.ndarray
    document_P: np.ndarray
    open: float = 0.0  # share of the tokens read that were not delivered at the end


def deliver(corpus: Corpus, *, num_streams: int, buffer: int, seed: int) -> Rows:
    sizes = {"seq_len": SEQ_LEN, "global_batch": ROWS, "num_streams": num_streams, "buffer": buffer}
    stream = TokenStream(StreamConfig(seed=seed, **sizes), source=corpus, tokenizer=None)
    starts, firsts = [], []
    for step in range(STEPS):
        for m, batch in enumerate(stream.next_step(MICRO)):
            at = np.flatnonzero(batch.positions_BL.numpy() == 0)  # where a piece begins
            starts.append(at + (step * ROWS + m * MICRO) * SEQ_LEN)
            firsts.append(batch.tokens_BL.numpy().ravel()[at])
    counts, start_P, first_P = stream.counts, np.concatenate(starts), np.concatenate(firsts)
    if counts["epoch"]:
        raise ValueError(f"the corpus was read to its end; TOTAL={TOTAL} is too small")
    length_P = np.diff(start_P, append=STEPS * ROWS * SEQ_LEN)
    document_P = np.searchsorted(corpus.start_N, first_P, side="right") - 1
    middle_P = first_P - corpus.start_N[document_P] + length_P / 2
    trend_P = TREND * (0.5 - middle_P / corpus.length_N[document_P])
    domain_P, row_P, num_rows = corpus.domain_N[document_P], start_P // SEQ_LEN, STEPS * ROWS
    loss_P = LEVEL_D[domain_P] + corpus.offset_N[document_P] + trend_P

    def mean(value_P: np.ndarray) -> np.ndarray:
        return np.bincount(row_P, value_P * length_P, num_rows) / SEQ_LEN

    share_RD = np.stack([mean(domain_P == domain) for domain in range(len(LEVEL_D))], axis=1)
    open_share = counts["open"] / (counts["open"] + counts["tokens"])
    return Rows(mean(loss_P), share_RD, mean(corpus.is_long_N[document_P]), row_P, document_P, open_share)


def shuffled(rows: Rows, *, seed: int) -> Rows:
    """The same rows in a random order."""
    order_R = np.random.default_rng(seed).permutation(len(rows.loss_R))
    place_R = order_R.argsort()
    return Rows(
        rows.loss_R[order_R],
        rows.share_RD[order_R],
        rows.long_R[order_R],
        place_R[rows.row_P],
        rows.document_P,
    )


def autocorrelation(value_T: np.ndarray, lag: int) -> float:
    off_T = value_T - value_T.mean()
    return float(off_T[lag:] @ off_T[: len(off_T) - lag] / (off_T @ off_T))


def shared_neighbours(rows: Rows, *, after: int) -> float:
    """Share of the pairs of neighbouring rows of a microbatch that hold pieces of the same document; rows
    from `after` on.
    """
    num_rows = len(rows.loss_R) + 1
    is_late = rows.row_P >= after
    key = np.unique(rows.document_P[is_late] * num_rows + rows.row_P[is_late])
    with_next = key[np.isin(key + 1, key)]
    row = np.unique(with_next % num_rows)
    pairs = (num_rows - 1 - after) // MICRO * (MICRO - 1)
    return float((row % MICRO != MICRO - 1).sum() / pairs)


def statistics(rows: Rows, corpus: Corpus) -> dict[str, float]:
    half = STEPS // 2 * ROWS
    loss_R = rows.loss_R[half:]
    step_T, micro_TM = loss_R.reshape(-1, ROWS).mean(1), loss_R.reshape(-1, ROWS // MICRO, MICRO).mean(2)
    off_MB = loss_R.reshape(-1, MICRO) - loss_R.mean()
    pairs = (off_MB.sum(1) ** 2 - (off_MB**2).sum(1)).mean() / (MICRO * (MICRO - 1))
    late = rows.row_P >= half
    documents = np.unique(rows.row_P[late] // ROWS * len(corpus) + rows.document_P[late]).size / len(step_T)
    return {
        "BatchHet": (micro_TM.max(1) - micro_TM.mean(1)).mean(),
        "variance of a step": 1e3 * step_T.var(),
        "of 10 steps, times 10": 1e3 * TOGETHER * step_T.reshape(-1, TOGETHER).mean(1).var(),
        "autocorrelation of steps": autocorrelation(step_T, 1),
        "correlation in a microbatch": pairs / (off_MB**2).mean(),
        "neighbours that share": shared_neighbours(rows, after=half),
        "domain distance, microbatch": domain_distance(rows.share_RD[half:], corpus, size=MICRO),
        "domain distance, step": domain_distance(rows.share_RD[half:], corpus, size=ROWS),
        "documents in a step": documents,
        "deviation of a row": loss_R.std(),
        "open at the end": rows.open,
    }


def domain_distance(share_RD: np.ndarray, corpus: Corpus, *, size: int) -> float:
    """Total variation between the shares of the domains in `size` rows and in the corpus, mean."""
    share_MD = share_RD.reshape(-1, size, len(LEVEL_D)).mean(1)
    return float(abs(share_MD - corpus.share_D).sum(1).mean() / 2)


def long_share(rows: Rows, corpus: Corpus) -> list[float]:
    """Of the longest tenth of the documents, span after span of the delivered tokens, over its share of the
    corpus.
    """
    bounds = [round(span * 1e6 / SEQ_LEN) for span in SPANS]
    return [rows.long_R[first:last].mean() / corpus.share_long for first, last in pairwise(bounds)]


def table(header: list[str], lines: list[list[str]]) -> str:
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines]) + "\n"
    )


def draw(path: str, rows_of: dict[str, Rows], corpus: Corpus) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "triquetra"  # the same file each time
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for i, arm in enumerate(DRAWN):
        rows, style = rows_of[arm], {"color": f"C{i}", "linestyle": "-" if arm.startswith("RSDB") else "--"}
        late_T = rows.loss_R.reshape(-1, ROWS).mean(1)[STEPS // 2 :]
        if arm in TRACED:
            left.plot(range(STEPS // 2 + 1, STEPS // 2 + 201), late_T[:200], **style)
        middle.plot(range(31), [autocorrelation(late_T, lag) for lag in range(31)], **style, label=arm)
        together = 20 * ROWS
        long = (
            rows.long_R[: len(rows.long_R) // together * together].reshape(-1, together).mean(1)
            / corpus.share_long
        )
        right.plot((np.arange(len(long)) + 0.5) * together * SEQ_LEN / 1e6, long, **style)
    left.set(xlabel="step", ylabel="[nats]", title="Mean loss of a step")
    middle.set(xlabel="steps apart", title="Autocorrelation of the steps' losses")
    right.set(xlabel="10^6 tokens delivered", title="Share of the longest tenth, over the corpus's")
    right.axhline(1, color="black", linewidth=0.6)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(DRAWN), fontsize=9)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in (*ARMS, SHUFFLED)}
    long: dict[str, list[list[float]]] = {arm: [] for arm in (*ARMS, SHUFFLED)}
    long_shares = []
    for seed in range(SEEDS):
        corpus = Corpus(seed=seed)
        rows_of = {
            arm: deliver(corpus, num_streams=v, buffer=buffer, seed=seed) for arm, (v, buffer) in ARMS.items()
        }
        rows_of[SHUFFLED] = shuffled(rows_of["sequential, 1 stream"], seed=seed)
        long_shares.append(corpus.share_long)
        for arm, rows in rows_of.items():
            found[arm].append(statistics(rows, corpus))
            long[arm].append(long_share(rows, corpus))
        if seed == 0 and len(sys.argv) > 1:
            draw(sys.argv[1], rows_of, corpus)
    names = list(found[SHUFFLED][0])
    for some in (names[:6], names[6:]):
        lines = [
            [arm, *(str(estimate([of[name] for of in seeds])) for name in some)]
            for arm, seeds in found.items()
        ]
        print(table(["", *some], lines))
    lines = []
    for arm, base in COMPARED:
        pairs = list(zip(found[arm], found[base], strict=True))
        het = [ours["BatchHet"] / theirs["BatchHet"] for ours, theirs in pairs]
        lower = [[theirs[name] / ours[name] for ours, theirs in pairs] for name in names[1:3]]
        cells = [f"{estimate(ratios)} ({min(ratios):.2f} to {max(ratios):.2f})" for ratios in (het, *lower)]
        lines.append([f"{arm} / {base}", *cells])
    print(
        table(
            [
                "mean ± 95 % interval (range over the seeds)",
                "BatchHet",
                "variance, times lower",
                "of 10 steps",
            ],
            lines,
        )
    )
    print(
        f"The longest tenth of the documents holds {estimate(long_shares)} of the tokens. Delivered, "
        "over that:\n"
    )
    spans = [f"{first} to {last}" for first, last in pairwise(SPANS)]
    lines = [[arm, *map(str, map(estimate, zip(*seeds, strict=True)))] for arm, seeds in long.items()]
    print(table(["10^6 tokens", *spans], lines))


if __name__ == "__main__":
    main()
