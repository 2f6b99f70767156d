"""What does data.length_bias draw from a corpus, and how many bytes has a token?

    python -m benchmarks.length_bias [docs/benchmarks/length_bias.svg]       (15 s)

The picture needs matplotlib. Lengths are made up: "web" is lognormal with a mean of 1,000 tokens (sigma 1.5);
in "web and books" one document of a thousand is a book of 100,000 tokens in the mean (sigma 0.7). Bytes are
measured on the Python standard library, with tokenizers trained on it.
"""

import math
import sys

import numpy as np

from trainer.data import LengthBias, PythonSource, load_tokenizer

NUM, BOOKS = 4_000_000, 1e-3  # documents; share of them
OCTAVES = 2.0 ** np.arange(4, 22)  # [tokens] where classes of length begin
SAMPLE = 200  # documents whose bytes are counted


def lognormal(mean: float, sigma: float, num: int, *, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.maximum(1, random.lognormal(math.log(mean) - sigma**2 / 2, sigma, num)).astype(int)


def corpora() -> dict[str, np.ndarray]:
    web = lognormal(1000, 1.5, NUM, seed=0)
    books = lognormal(100_000, 0.7, round(NUM * BOOKS), seed=1)
    return {"web": web, "web and books": np.concatenate([web, books])}


def drawn(lengths: np.ndarray, bias: LengthBias) -> np.ndarray:
    """Which ones the bias draws, as a run with seed 0 does."""
    hashed = {"seed": 0, "source": "data.source"}
    return np.array([bias.draws(length, **hashed, number=n) for n, length in enumerate(lengths.tolist())])


def by_octave(lengths: np.ndarray) -> np.ndarray:
    """Share of the tokens in documents of each class."""
    tokens, _ = np.histogram(lengths, bins=[*OCTAVES, np.inf], weights=lengths)
    return tokens / lengths.sum()


def share_above(lengths: np.ndarray, limit: int) -> float:
    return lengths[lengths >= limit].sum() / lengths.sum()


def line(name: str, lengths: np.ndarray, kept: np.ndarray) -> str:
    cells = [f"{len(lengths) / len(kept):.0f}", f"{lengths.sum() / kept.sum():.1f}"]
    cells += [f"{some.mean():,.0f}" for some in (lengths, kept)]
    cells += [
        f"{100 * share_above(some, limit):.1f} %" for limit in (32_768, 131_072) for some in (lengths, kept)
    ]
    return f"| {name} | {' | '.join(cells)} |"


def bytes_per_token(source: PythonSource, *, vocab_size: int) -> float:
    tokenizer = load_tokenizer("train", source=source, vocab_size=vocab_size, cache_dir=None)
    texts = [source[i].text for i in range(0, len(source), max(1, len(source) // SAMPLE))]
    num_tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    return sum(len(text.encode()) for text in texts) / num_tokens


def draw(path: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], bias: LengthBias) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "triquetra"  # the same file each time
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters stay letters
    from matplotlib import pyplot

    figure, (left, *others) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    lengths = np.geomspace(OCTAVES[0], 2 * OCTAVES[-1], 400)
    left.plot(lengths, [100 * bias.probability(length) for length in lengths], color="black")
    left.set(title="Probability that a document is drawn", ylabel="%", ylim=(0, 100))
    for axes, (name, pair) in zip(others, pairs.items(), strict=True):
        for some, label in zip(pair, ("of the corpus", "of what is drawn"), strict=True):
            axes.stairs(100 * by_octave(some), [*OCTAVES, 2 * OCTAVES[-1]], label=label, fill=True, alpha=0.5)
        axes.set(title=f"{name}: share of the tokens", ylabel="%")
        axes.legend(loc="upper left", fontsize=9)
    for axes in (left, *others):
        axes.set(xscale="log", xlabel="tokens of the document")
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


def main() -> None:
    bias, pairs = LengthBias(), dict[str, tuple[np.ndarray, np.ndarray]]()
    print(
        "| corpus | documents read for one | tokens read for one | mean length | drawn | in documents of "
        "32K and more | drawn | of 128K and more | drawn |"
    )
    for name, lengths in corpora().items():
        pairs[name] = (lengths, lengths[drawn(lengths, bias)])
        print(line(name, *pairs[name]), flush=True)
    for vocab_size in (1024, 8192):
        measured = bytes_per_token(PythonSource(), vocab_size=vocab_size)
        print(f"the Python standard library, a vocabulary of {vocab_size}: {measured:.2f} bytes a token")
    if len(sys.argv) > 1:
        draw(sys.argv[1], pairs, bias)


if __name__ == "__main__":
    main()
