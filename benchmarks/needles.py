"""Does `Needles` count the answers that transformers' `generate` writes, of a model that can find them?

    python -m benchmarks.needles [steps=1000] [any setting of the trainer: seed=1 ...]

Trains a tiny model on questions like those of `Needles`, of one length, with other draws; only what is asked
and answered is learned. Exports it, and asks 200 questions of each length both ways: one forward pass in our
model and greedy decoding in transformers. Ends with 1 if a single answer is judged otherwise.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from trainer import train
from trainer.evaluate import Part, measure
from trainer.evaluate.__main__ import exported
from trainer.ranks.stop import StopRequest
from trainer.weights.export import main as export

LENGTH, LENGTHS = 64, (64, 96, 128)  # [tokens] trained on, and asked
KEYS, DIGITS = 3, 2
DEPTHS, SAMPLES = [0, 25, 50, 75, 100], 40
SETTINGS = [
    *("name=needles", "model.vocab_size=640", "model=debug", "model.num_layers=4"),
    # A local layer sees little more than a name and its number, so it need not learn where to look.
    *("model.global_every=2", "model.window=4", "model.head_dim=32", f"seq_len={LENGTH}"),
    *("global_batch=32", "micro_batch=32", "optim=muon", "optim.lr=0.01", "optim.adamw_lr=0.003"),
    *("data=python", "data.source._target_=trainer.evaluate.NeedleSource", "data.packing=fit"),
    *(f"+data.source.length={LENGTH}", f"+data.source.keys={KEYS}", f"+data.source.digits={DIGITS}"),
    *("steps=1000", "checkpoint.interval=1000000", "logging.interval=100"),
]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train.main([*SETTINGS, node([LENGTH], interval=100), f"run_dir={name}", *sys.argv[1:]])
        if export([str(directory / "needles"), str(directory / "out")]):
            raise SystemExit("the export failed")
        return compared(directory / "out", scratch=name)


def node(lengths: Sequence[int], **more: int) -> str:
    arguments = {
        "lengths": list(lengths),
        "depths": DEPTHS,
        "samples": SAMPLES,
        "keys": KEYS,
        "digits": DIGITS,
    }
    text = ", ".join(f"{key}: {value}" for key, value in (arguments | more).items())
    return f"evaluate.needles={{_target_: trainer.evaluate.Needles, at_start: true, {text}}}"


@torch.no_grad()
def compared(out: Path, *, scratch: str) -> int:
    """Prints exact answers by length and depth, and how many questions the two sides judge otherwise."""
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    wrong = 0
    with StopRequest() as stop:
        run = exported(out, [node(LENGTHS)], scratch=scratch, stop=stop)
        for part in run.evaluations.parts["needles"]:
            sums = measure(run, part)
            ours = sums.hits_G == sums.targets_G
            generated = torch.tensor([is_generated(theirs, part, group) for group in range(part.num_groups)])
            differ = int((ours != generated).sum())
            wrong += differ
            by_depth = ours.view(len(DEPTHS), SAMPLES).double().mean(1).tolist()
            shown = "  ".join(
                f"{depth:3d} %: {share:.3f}" for depth, share in zip(DEPTHS, by_depth, strict=True)
            )
            print(
                f"length {part.about['length']:3d}: exact {ours.double().mean():.3f} of {len(ours)}, "
                f"generate {generated.double().mean():.3f}, judged otherwise: {differ}   {shown}"
            )
    return 1 if wrong else 0


def is_generated(model: Any, part: Part, group: int) -> bool:
    """Whether greedy decoding writes this answer after its question."""
    is_answer_RL = (part.groups_RL == group) & (part.labels_RL >= 0)
    [row] = is_answer_RL.any(1).nonzero().flatten().tolist()
    places = is_answer_RL[row].nonzero().flatten()
    first, last = int(places[0]), int(places[-1])
    start = first - int(part.positions_RL[row, first])
    prompt_1L = part.tokens_RL[row : row + 1, start : first + 1]
    answer = part.labels_RL[row, first : last + 1]
    written_1L = model.generate(
        prompt_1L,
        attention_mask=torch.ones_like(prompt_1L),
        max_new_tokens=len(answer),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return torch.equal(written_1L[0, prompt_1L.shape[1] :], answer)


if __name__ == "__main__":
    sys.exit(main())
