"""What does it cost to evaluate N tokens, in the time of training on them?

    python -m benchmarks.evaluate [rounds=9] [any setting of the trainer: model=small seq_len=512 ...]

One run, one process. Each round trains a step on N packed tokens and evaluates N other tokens, in turns, in
seconds of CPU time, which neighbours on the machine do not change much;
the figure is the median of the rounds' ratios, with the smallest and largest.
Making the rows once and reading data are excluded on both sides.
"""

import statistics
import sys
import tempfile
import time

import torch

from trainer import train
from trainer.config import load
from trainer.evaluate import Example, measure, packed
from trainer.run.step import next_batches

SETTINGS = [
    *("name=benchmark", "model=tiny", "data=synthetic", "steps=1000000", "seq_len=512", "global_batch=2"),
    *("micro_batch=2", "data.workers=0", "optim.lr=1e-4", "stage.warmup.share=0"),
]
LIMIT = 0.4


def main() -> int:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("rounds=")]
    rounds = next((int(a.split("=")[1]) for a in sys.argv[1:] if a.startswith("rounds=")), 9)
    with tempfile.TemporaryDirectory() as directory:
        config = load([*SETTINGS, f"run_dir={directory}", *arguments])
        run = train.build(config)
        num_rows, seq_len = config.global_batch, config.seq_len
        generator = torch.Generator().manual_seed(0)
        tokens_RT = torch.randint(config.model.vocab_size, (num_rows, seq_len + 1), generator=generator)
        groups_T = torch.arange(seq_len + 1).double().clamp_min(0.5).log2().floor().long()
        examples = [Example(tokens_T, groups_T) for tokens_T in tokens_RT]
        part = packed(examples, name="held out", seq_len=seq_len, num_groups=32, about={})
        batches, ratios, train_s = next_batches(run), list[float](), list[float]()
        for round_ in range(rounds + 2):  # two to warm up
            start_s = time.process_time()
            train.train_step(run, batches)
            between_s = time.process_time()
            measure(run, part)
            end_s = time.process_time()
            if round_ >= 2:
                train_s.append(between_s - start_s)
                ratios.append((end_s - between_s) / (between_s - start_s))
    num_tokens, ratio = num_rows * seq_len, statistics.median(ratios)
    print(
        f"{num_tokens} tokens, {torch.get_num_threads()} threads, {rounds} rounds: "
        f"training {num_tokens / statistics.median(train_s):.0f} tokens/s; evaluating takes {ratio:.3f} of "
        f"it ({min(ratios):.3f} to {max(ratios):.3f}), at most {LIMIT} is wanted"
    )
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
