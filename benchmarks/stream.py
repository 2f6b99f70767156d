"""How fast does text become rows of tokens, next to its tokenizer alone and to torchtitan's loader?

    python -m benchmarks.stream [vocab_size=32768] [backends=tokenizers,fastokens,gigatoken]

One corpus, one tokenizer, one thread in each process, contenders in turn in one run, each beside a round of
the tokenizer alone: 10^6 tokens per CPU-second, all CPU time of workers included, also that in which they
read ahead while others are measured.
"""

import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

import numpy as np

from trainer.data import JsonlSource, PythonSource, StreamConfig, TokenStream, end_of_text_id, load_tokenizer
from trainer.ranks.device import keep_freed_memory

SEQ_LEN, ROWS, ROUNDS = 2048, 8, 5
ROUND_TOKENS = {"tokenizers": 700_000, "fastokens": 12_000_000, "gigatoken": 12_000_000}
TICK = os.sysconf("SC_CLK_TCK")


def write_corpus(path: Path, *, mean_chars: int = 3000) -> int:
    """The standard library cut at line ends into documents of lognormal lengths. Returns their number."""
    source, random, num_documents = PythonSource(), np.random.default_rng(0), 0
    with path.open("w") as file:
        for i in range(len(source)):
            try:
                lines = source[i].text.splitlines(keepends=True)
            except Exception:  # noqa: BLE001  # a few files are not UTF-8
                continue
            while lines:
                size, chars, end = random.lognormal(np.log(mean_chars) - 0.5, 1.0), 0, 0
                while end < len(lines) and chars < size:
                    chars, end = chars + len(lines[end]), end + 1
                file.write(json.dumps({"text": "".join(lines[:end])}) + "\n")
                del lines[:end]
                num_documents += 1
    return num_documents


def cpu_s(pids: list[int]) -> float:
    """[s] Used by these processes so far."""
    ticks = (Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13] for pid in pids)
    return sum(sum(map(int, each)) for each in ticks) / TICK


class Contender:
    """Tokens per CPU-second of each round."""

    def __init__(self, name: str, step: Callable[[], int], *, tokens: int, pids: Sequence[int] = ()) -> None:
        self.name, self.step, self.tokens, self.pids, self.speeds = name, step, tokens, pids, []
        self.of_workers_s = cpu_s(pids)

    def run(self) -> None:
        start_s, before_s, done = time.process_time(), self.of_workers_s, 0
        while done < self.tokens:
            done += self.step()
        self.of_workers_s = cpu_s(self.pids)
        self.speeds.append(done / (time.process_time() - start_s + self.of_workers_s - before_s) / 1e6)


def raw(source: JsonlSource, tokenizer) -> Iterator[int]:
    """Nothing but the tokenizer, on batches of texts that are in memory."""
    texts = [source[i].text for i in range(len(source))]
    while True:
        for start in range(0, len(texts), 256):
            yield sum(
                map(len, tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False))
            )


def torchtitan_loader(path: Path, tokenizer) -> Iterator[int]:
    from datasets import load_dataset
    from torchtitan.hf_datasets import DatasetConfig, text_datasets

    class Same:
        def encode(self, text: str, *, add_bos: bool, add_eos: bool) -> list[int]:
            return [*tokenizer.encode(text, add_special_tokens=False).ids, end_of_text_id(tokenizer)]

    def load(path: str):
        return load_dataset(
            "json", data_files=path, split="train", cache_dir=str(Path(path).parent / "cache")
        )

    logging.getLogger("torchtitan").setLevel(logging.ERROR)
    text_datasets.DATASETS["ours"] = DatasetConfig(
        path=str(path), loader=load, sample_processor=lambda row: row["text"]
    )
    loader = text_datasets.HuggingFaceTextDataset("ours", str(path), Same(), seq_len=SEQ_LEN, infinite=True)
    for row, _ in loader:
        yield row["input"].numel()


def make(source: JsonlSource, tokenizer, **settings) -> TokenStream:
    config = StreamConfig(seq_len=SEQ_LEN, global_batch=ROWS, num_streams=ROWS, seed=0, **settings)
    return TokenStream(config, source=source, tokenizer=tokenizer)


def ours(name: str, source: JsonlSource, tokenizer, *, tokens: int, **settings) -> Contender:
    stream = make(source, tokenizer, **settings)
    stream.next_step(ROWS)
    return Contender(
        name,
        lambda: len(stream.next_step(ROWS)) * ROWS * SEQ_LEN,
        tokens=tokens,
        pids=stream.intake.workers.pids,
    )


def resume(source: JsonlSource, tokenizer, **settings) -> tuple[float, float, int]:
    """[s] to the first batch of a new stream and of a resumed one, which has that many documents open."""
    settings = {"buffer": 8192 // ROWS // 2, "shuffle": False, **settings}
    start_s = time.perf_counter()
    stream = make(source, tokenizer, **{**settings, "buffer": 0})
    stream.next_step(ROWS)
    first_s = time.perf_counter() - start_s
    stream.close()
    stream = make(source, tokenizer, **settings)
    stream.next_step(ROWS)
    state, num_open = stream.state_dict(), stream.open_documents[0]
    stream.close()
    start_s = time.perf_counter()
    stream = make(source, tokenizer, **settings)
    stream.load_state_dict(state, keep_counts=True)
    stream.next_step(ROWS)
    resumed_s = time.perf_counter() - start_s
    stream.close()
    return first_s, resumed_s, num_open


def main(vocab_size: int, backends: list[str]) -> None:
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        num_documents = write_corpus(path)
        source = JsonlSource(str(path))
        tokenizer = load_tokenizer("train", source=source, vocab_size=vocab_size, cache_dir=folder)
        print(f"{num_documents} documents, {path.stat().st_size / 1e6:.0f} MB, {vocab_size} entries\n")
        bare, other = raw(source, tokenizer), torchtitan_loader(path, tokenizer)
        tokens = ROUND_TOKENS["tokenizers"]
        alone = Contender("`tokenizers` alone", lambda: next(bare), tokens=tokens)
        contenders = [Contender("torchtitan 0.3.0", lambda: next(other), tokens=tokens)]
        for backend in backends:
            for label, settings in {
                "no worker": {},
                "1 worker": {"workers": 1},
                "2 workers": {"workers": 2},
                "1 worker, buffer 64": {"workers": 1, "buffer": 64},
            }.items():
                name = f"{backend}, {label}"
                contenders.append(
                    ours(name, source, tokenizer, tokens=ROUND_TOKENS[backend], backend=backend, **settings)
                )
        for i in range(ROUNDS + 1):
            for contender in contenders:
                if i:  # in the first round it is still filling what lies ahead
                    alone.run()
                contender.run()
        base = np.array(alone.speeds).reshape(ROUNDS, len(contenders)).T
        print("| | 10^6 tokens per CPU-second | of `tokenizers` alone |\n|---|---|---|")
        print(f"| {alone.name} | {np.median(base):.2f} ({base.min():.2f} to {base.max():.2f}) | |")
        for contender, base_R in zip(contenders, base, strict=True):
            ratios = np.array(contender.speeds[1:]) / base_R
            spread = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
            print(f"| {contender.name} | {np.median(contender.speeds):.2f} | {spread} |")
        print("\n| | first batch [s] | first batch after a resume [s] | documents open |\n|---|---|---|---|")
        for backend in backends:
            for workers in (0, 2):
                first_s, resumed_s, num_open = resume(source, tokenizer, backend=backend, workers=workers)
                print(f"| {backend}, {workers} workers | {first_s:.2f} | {resumed_s:.2f} | {num_open} |")


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(int(given.get("vocab_size", 32768)), given.get("backends", ",".join(ROUND_TOKENS)).split(","))
