"""After as many tokens as the corpus has, how many documents were not read yet, and how many twice? [% of
documents]

python -m benchmarks.epoch
"""

import numpy as np

from benchmarks.packing import Memory
from trainer.data import PythonSource, StreamConfig, TokenStream

SEQ_LEN, SEEDS = 256, 5


def after_an_epoch(source: Memory, *, num_streams: int, seed: int) -> tuple[float, float]:
    """The share of documents that no stream has opened, and the share that one has opened a second time."""
    config = StreamConfig(seq_len=SEQ_LEN, global_batch=num_streams, num_streams=num_streams, seed=seed)
    stream = TokenStream(config, source=source, tokenizer=None)
    num_tokens, num_documents = sum(map(len, source.documents)), len(source)
    for _ in range(num_tokens // (num_streams * SEQ_LEN)):
        stream.next_step(num_streams)
    opened = 0
    for virtual in stream.virtual:
        opened += len(range(virtual.number, min(virtual.opener.next_S[0], num_documents), num_streams))
    all_opened = sum(len(range(v.number, v.opener.next_S[0], num_streams)) for v in stream.virtual)
    return 1 - opened / num_documents, (all_opened - opened) / num_documents


def of_lengths(lengths: list[int]) -> Memory:
    source = Memory(1, total=64)
    source.documents = [np.ones(length, np.uint32) for length in lengths]
    return source


def main() -> None:
    library = [max(1, file.stat().st_size // 4) for file in PythonSource().files]  # 4 bytes a token
    random = np.random.default_rng(0)
    corpora = {"the Python standard library": of_lengths(library)}
    for num_documents in (2_000, 20_000):
        lengths = np.maximum(1, random.lognormal(np.log(500) - 0.5, 1.0, num_documents)).astype(int)
        corpora[f"{num_documents:,} documents, lognormal, sigma 1"] = of_lengths(lengths.tolist())
    print("| corpus | streams | not read yet [%] | read twice [%] |\n|---|---|---|---|")
    for name, source in corpora.items():
        for num_streams in (16, 64):
            shares = [after_an_epoch(source, num_streams=num_streams, seed=seed) for seed in range(SEEDS)]
            missing, twice = 100 * np.mean(shares, axis=0)
            print(f"| {name} | {num_streams} | {missing:.1f} | {twice:.1f} |", flush=True)


if __name__ == "__main__":
    main()
