"""How fast are documents packed into rows, without reading and tokenising them? [10^6 tokens per CPU-second]

python -m benchmarks.packing
"""

import time

import numpy as np

from trainer.data import Document, StreamConfig, TokenStream
from trainer.ranks.device import keep_freed_memory

SEQ_LEN, STREAMS, ROUNDS, STEPS = 8192, 8, 15, 30


class Memory:
    """Documents of lognormal lengths, in memory."""

    fingerprint = "memory"

    def __init__(self, mean_length: float, *, total: int, sigma: float = 1.0) -> None:
        random = np.random.default_rng(0)
        drawn = random.lognormal(np.log(mean_length) - sigma**2 / 2, sigma, max(64, int(total / mean_length)))
        lengths = np.maximum(1, drawn).astype(int)
        tokens = random.integers(0, 100_000, lengths.sum()).astype(np.uint32)
        self.documents = np.split(tokens, np.cumsum(lengths)[:-1])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, i: int) -> Document:
        return Document("memory", tokens=self.documents[i])


def speed(source: Memory | dict[str, Memory], *, buffer: int) -> float:
    """Of the fastest of some rounds: what else runs on the machine can only slow it down."""
    sizes = {"seq_len": SEQ_LEN, "global_batch": STREAMS, "num_streams": STREAMS, "buffer": buffer}
    stream = TokenStream(StreamConfig(seed=0, **sizes), source=source, tokenizer=None)
    stream.read_ahead(ROUNDS * STEPS + 40)
    for virtual in stream.virtual:
        for queue in virtual.opener.queue_S:
            for ticket in queue:
                ticket.get()  # tokenised before
    stream.next_step(STREAMS)  # fills the buffer
    seconds = []
    for _ in range(ROUNDS):
        start_s = time.process_time()
        for _ in range(STEPS):
            stream.next_step(STREAMS)
        seconds.append(time.process_time() - start_s)
    return STEPS * SEQ_LEN * STREAMS / min(seconds) / 1e6


if __name__ == "__main__":
    keep_freed_memory()  # as a run does
    for mean_length in (70, 700, 7_000, 70_000, 700_000, 7_000_000):
        source = Memory(mean_length, total=16_000_000)
        found = ", ".join(f"{speed(source, buffer=buffer):.0f}" for buffer in (0, 64, 1024))
        print(f"documents of {mean_length:,} tokens, buffer 0, 64, 1024: {found}")
    ragged = Memory(5_000, total=40_000_000, sigma=1.8)
    found = ", ".join(f"{speed(ragged, buffer=buffer):.0f}" for buffer in (0, 64, 128))
    print(f"documents of 5,000 tokens, sigma 1.8, buffer 0, 64, 128: {found}")
    several = {name: Memory(700, total=8_000_000) for name in "abcd"}
    print(
        f"4 sources, documents of 700 tokens, buffer 0, 64: {speed(several, buffer=0):.0f}, "
        f"{speed(several, buffer=64):.0f}"
    )
