"""Does `Needles` count the answers that transformers' `generate` writes, of a model that can find them?

    python -m benchmarks.needles [steps=1000] [any setting of the trainer: seed=1 ...]

Trains a tiny model on questions like those of `Needles`, of one length, with other draws; only what is asked
and answered is learned. Exports it, and asks 200 questions of each length both ways: one forward pass in our
model and greedy decoding in transformers. Ends with 1 if a single answer is judged otherwise.
"""

import random
import string
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from trainer import train
from trainer.data import Document, load_tokenizer
from trainer.data.tokenizer import train_tokenizer
from trainer.evaluate import Material, Needles, Part, measure
from trainer.evaluate.__main__ import exported
from trainer.evaluate.needles import KINDS, NEEDLE, QUESTION, THINGS
from trainer.ranks.stop import StopRequest
from trainer.weights.export import main as export

LENGTH, LENGTHS = 64, (64, 96, 128)  # [tokens] trained on, and asked
KEYS, DIGITS, VOCAB_SIZE = 3, 2, 640
DEPTHS, SAMPLES = [0, 25, 50, 75, 100], 40
SETTINGS = [
    *("name=needles", f"model.vocab_size={VOCAB_SIZE}", "model=debug", "model.num_layers=4"),
    # A local layer sees little more than a name and its number, so it need not learn where to look.
    *("model.global_every=2", "model.window=4", "model.head_dim=32", f"seq_len={LENGTH}"),
    *("global_batch=32", "micro_batch=32", "optim=muon", "optim.lr=0.01", "optim.adamw_lr=0.003"),
    *("data=python", "data.source._target_=benchmarks.needles.Questions"),
    *("data.workers=1", "steps=1000", "checkpoint.interval=1000000", "logging.interval=100"),
]
TOLD, ASKED = 8, 17  # [tokens] of a needle, and of a question with its answer
NAMES = [f"{kind} {thing}" for kind in KINDS.split() for thing in THINGS.split()]
NEEDLES = Needles([LENGTH], keys=KEYS, digits=DIGITS)


class Texts:
    """What the tokenizer is trained on: a needle that is asked, one that is not, and the question."""

    fingerprint = f"needle texts {DIGITS}"

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, i: int) -> Document:
        draw = random.Random(f"text {i}")
        asked, other = needle(draw), next(NEEDLES.distractors(draw))
        key, value = asked.removeprefix("The number of ").removesuffix(".").split(" is ")
        return Document(f"text {i}", text=f"{asked} {other}{QUESTION.format(key=key)} {value}.")


class Questions:
    """A million documents, each a row: an answer never lies in another row than its needle.

    Every second one is a question of `Needles`; the others are two to five needles, one of which is asked.
    """

    masks = True

    def __init__(self, tokenizer: str) -> None:
        self.fingerprint = f"needle questions {LENGTH} {KEYS} {DIGITS}"
        self.material = material(load_tokenizer(tokenizer, source=self, vocab_size=VOCAB_SIZE))

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, i: int) -> Document:
        draw = random.Random(f"training {i}")
        text = (self.question, self.told)[i % 2](draw)
        encoding = self.material.tokenizer.encode(text, add_special_tokens=False)
        asked = text.index("\n")
        is_learned = np.array([start > asked for start, _ in encoding.offsets])
        padding = 0, LENGTH - len(encoding.ids)
        ids = np.array(encoding.ids, np.uint32)
        return Document(f"document {i}", tokens=np.pad(ids, padding), mask=np.pad(is_learned, padding))

    def question(self, draw: random.Random) -> str:
        depth = draw.uniform(0, 100)
        return "".join(NEEDLES.question(LENGTH, depth, draw, NEEDLES.distractors, self.material))

    def told(self, draw: random.Random) -> str:
        names = draw.sample(NAMES, draw.randint(2, (LENGTH - ASKED) // TOLD))
        values = ["".join(draw.choices(string.digits, k=DIGITS)) for _ in names]
        pairs = list(zip(names, values, strict=True))
        key, value = draw.choice(pairs)
        needles = " ".join(NEEDLE.format(key=key, value=value) for key, value in pairs)
        return f"{needles}{QUESTION.format(key=key)} {value}."


def needle(draw: random.Random) -> str:
    return NEEDLE.format(key=draw.choice(NAMES), value="".join(draw.choices(string.digits, k=DIGITS)))


def material(tokenizer: Tokenizer | None) -> Material:
    return Material(
        name="needles",
        sources={},
        make_source=None,
        tokenizer=tokenizer,
        vocab_size=VOCAB_SIZE,
        seq_len=LENGTH,
        holdout=0.0,
        max_document_mb=1.0,
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = directory / "tokenizer.json"
        train_tokenizer(Texts(), VOCAB_SIZE).save(str(tokenizer))
        data = [f"+data.source.tokenizer={tokenizer}", f"data.tokenizer={tokenizer}"]
        asked = node([LENGTH], interval=100)
        train.main([*SETTINGS, *data, asked, f"run_dir={name}", *sys.argv[1:]])
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
