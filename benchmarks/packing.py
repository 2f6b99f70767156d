"""How fast are documents packed into rows, without reading and tokenising them? [10^6 tokens per CPU-second]

python -m benchmarks.packing
"""

import gc
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from trainer.data import Document, StreamConfig, TokensSource, TokenStream
from trainer.data.cache import file_hash
from trainer.data.shards import CORPUS, FORMAT, INDEX, Shard, shard_file
from trainer.ranks.device import keep_freed_memory

SEQ_LEN, STREAMS, ROUNDS, STEPS = 8192, 8, 10, 12
MOST_OPEN = 10**9  # [tokens] 4 bytes each


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


def speed(source: object, *, mean_length: float, buffer: int = 0) -> float:
    """Of the fastest of some rounds: what else runs on the machine can only slow it down."""
    sizes = {"seq_len": SEQ_LEN, "global_batch": STREAMS, "num_streams": STREAMS, "buffer": buffer}
    stream = TokenStream(StreamConfig(seed=0, **sizes), source=source, tokenizer=None)
    stream.next_step(STREAMS)  # from now on it knows how long documents are
    num_sources = len(stream.readers)
    goal = int(1.15 * (ROUNDS * STEPS + 10) * SEQ_LEN / mean_length / num_sources) + 3 * buffer
    for virtual in stream.virtual:
        for s, queue in enumerate(virtual.opener.queue_S):
            virtual.opener.request(s, goal)
            for ticket in queue:
                ticket.task.result()  # read and tokenised before
    stream.next_step(STREAMS)  # fills the buffer
    return fastest(stream)


def read_speed(source: object) -> float:
    """With the reading of the documents."""
    sizes = {"seq_len": SEQ_LEN, "global_batch": STREAMS, "num_streams": STREAMS}
    stream = TokenStream(StreamConfig(seed=0, **sizes), source=source, tokenizer=None)
    stream.next_step(STREAMS)
    return fastest(stream)


def fastest(stream: TokenStream) -> float:
    seconds = []
    for _ in range(ROUNDS):
        start_s = time.process_time()
        for _ in range(STEPS):
            stream.next_step(STREAMS)
        seconds.append(time.process_time() - start_s)
    return STEPS * SEQ_LEN * STREAMS / min(seconds) / 1e6


def as_tokens(folder: Path, source: Memory) -> TokensSource:
    """The documents as files of tokens; `triquetra tokenize` would need texts."""
    lengths = [len(document) for document in source.documents]
    index_D = np.zeros(len(lengths), INDEX)
    index_D["end"] = np.cumsum(lengths)
    shard_file(folder, 0, "tokens").write_bytes(np.concatenate(source.documents).astype("<u4").tobytes())
    shard_file(folder, 0, "index").write_bytes(index_D.tobytes())
    hashes = {suffix: file_hash(shard_file(folder, 0, suffix)) for suffix in ("tokens", "index")}
    shard = Shard(len(lengths), sum(lengths), 99_999, hashes, {})
    about = {"format": FORMAT, "dtype": "<u4", "tokenizer": "none", "shards": [shard._asdict()]}
    (folder / CORPUS).write_text(json.dumps(about))
    return TokensSource(str(folder), cache_dir=str(folder / "cache"))


def main() -> None:
    keep_freed_memory()  # as a run does
    gc.disable()  # a run collects between steps
    for mean_length in (70, 700, 7_000, 70_000, 700_000):
        source = Memory(mean_length, total=8_000_000)
        # an open document has its tokens in memory, whether or not the source has them there already
        buffers = [b for b in (0, 64, 1024) if 2 * b * STREAMS * mean_length < MOST_OPEN]
        speeds = (f"buffer {b}: {speed(source, mean_length=mean_length, buffer=b):.0f}" for b in buffers)
        print(f"documents of {mean_length:,} tokens, {', '.join(speeds)}", flush=True)
    several = {name: Memory(700, total=4_000_000) for name in "abcd"}
    speeds = (f"{speed(several, mean_length=700, buffer=b):.0f}" for b in (0, 64))
    print(f"4 sources, documents of 700 tokens, buffer 0, 64: {', '.join(speeds)}")
    for mean_length in (700, 7_000, 70_000):
        with tempfile.TemporaryDirectory() as folder:
            source = as_tokens(Path(folder), Memory(mean_length, total=50_000_000))
            print(f"data=tokens, documents of {mean_length:,} tokens, with reading: {read_speed(source):.0f}")


if __name__ == "__main__":
    main()
