"""How far from its weights is a mixture, in what is delivered? The largest error of a share over windows of
1.05 million tokens.

python -m benchmarks.mixture
"""

import math

import numpy as np

from trainer.data import Document, StreamConfig, TokenStream

WEIGHTS = {"a": 0.1, "b": 0.5, "c": 0.3, "d": 0.1}
MEANS = {"a": 60, "b": 700, "c": 5000, "d": 2000}  # [tokens] of a document
SEQ_LEN, ROWS, STEPS, WINDOWS, SEEDS = 2048, 32, 16, 3, 2


class Marked:
    """Documents whose tokens are the number of their source."""

    fingerprint = "marked"

    def __init__(self, number: int, *, mean: float, sigma: float, seed: int) -> None:
        lengths = np.random.default_rng(seed).lognormal(math.log(mean) - sigma**2 / 2, sigma, int(6e6 / mean))
        self.number, self.lengths = number, np.maximum(1, lengths).astype(int)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Document:
        return Document("marked", tokens=np.full(self.lengths[i], self.number, np.uint32))


def errors(sigma: float, *, num_streams: int, buffer: int) -> list[float]:
    """Of each window from the start, the larger of two seeds."""
    found = np.zeros((SEEDS, WINDOWS))
    for seed in range(SEEDS):
        sources = {
            name: Marked(i, mean=mean, sigma=sigma, seed=10 * seed + i)
            for i, (name, mean) in enumerate(MEANS.items())
        }
        config = StreamConfig(
            seq_len=SEQ_LEN,
            global_batch=ROWS,
            num_streams=num_streams,
            seed=seed,
            mixture=WEIGHTS,
            buffer=buffer,
        )
        stream = TokenStream(config, source=sources, tokenizer=None)
        for window in range(WINDOWS):
            tokens = np.concatenate(
                [stream.next_step(ROWS)[0].tokens_BL.numpy().ravel() for _ in range(STEPS)]
            )
            shares = np.bincount(tokens, minlength=len(WEIGHTS)) / len(tokens)
            found[seed, window] = np.abs(shares - list(WEIGHTS.values())).max()
    return found.max(0).tolist()


if __name__ == "__main__":
    print("| sigma of lengths | streams | buffer | 1st window | 2nd | 3rd |\n|---|---|---|---|---|---|")
    for sigma in (0.7, 1.8):
        for num_streams in (1, 8, 32):
            for buffer in (0, 4, 64):
                found = " | ".join(
                    f"{100 * error:.2f} %" for error in errors(sigma, num_streams=num_streams, buffer=buffer)
                )
                print(f"| {sigma} | {num_streams} | {buffer} | {found} |", flush=True)
