"""What does the model answer to fixed prompts? Greedy decoding by whole forward passes, on any layout.

Every rank computes all prompts, and nobody keeps their keys: a few short answers cost less than a cache would
take to build. The rank that holds a prompt's last token says the likeliest next one.

Letters: R prompts, L tokens of a row, B rows of a forward pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import ConfigError, Number, check_numbers
from trainer.data import PADDING_POSITION, ChatSource
from trainer.evaluate.kernel import ASK_EVERY, evaluating, is_told_to_stop
from trainer.evaluate.rows import Part
from trainer.evaluate.sets import LIMITS, Material
from trainer.ranks import device
from trainer.run.state import Run

PROMPTS = (
    "What is Triquetra?",
    "How do I resume a run?",
    "What does MaxVio mean?",
    "How many experts does a token of Trinity Large visit?",
    "Who won the match?",
)
TOKENS = Number(at_least=1, at_most=4096, why="each token is a forward pass over the whole row")
MAX_LOGITS = 2**28  # of a forward pass


@dataclass(frozen=True, kw_only=True)
class Answered:
    prompts: list[str]
    answers: list[str]
    num_tokens: list[int]  # of each answer
    has_ended: list[bool]


class Answers:
    """prompts: what the user says, each a conversation of its own; null: five about this project. tokens: of
    an answer at most. interval: [steps]. Of data=chat. Raises: ConfigError.
    """

    best = "unended"

    def __init__(
        self,
        prompts: Sequence[str] | None = None,
        tokens: int = 48,
        interval: int = 200,
        at_start: bool = True,
    ) -> None:
        check_numbers({**LIMITS, "tokens": TOKENS}, tokens=tokens, interval=interval)
        self.prompts = list(PROMPTS if prompts is None else prompts)
        if not self.prompts or not all(isinstance(prompt, str) and prompt for prompt in self.prompts):
            raise ConfigError(f"prompts={self.prompts}: must be texts, like ['What is Triquetra?']")
        self.tokens, self.interval, self.at_start = tokens, interval, at_start

    def parts(self, material: Material) -> list[Part]:
        chat = next((one for one in material.sources.values() if isinstance(one, ChatSource)), None)
        if chat is None:
            raise ConfigError(f"evaluate.{material.name}: asks in a conversation; it needs data=chat")
        asked = [{"role": "user", "content": prompt} for prompt in self.prompts]
        begun = {"add_generation_prompt": True}
        ids = [chat.bound([message], variables=begun).ids.tolist() for message in asked]
        example, mask = chat.bound([asked[0], {"role": "assistant", "content": "a"}])
        ends = [] if mask is None else [int(example[mask][-1])]
        shape = (len(ids), max(map(len, ids)) + self.tokens)
        tokens_RL, positions_RL = torch.zeros(shape, dtype=torch.int64), torch.full(shape, PADDING_POSITION)
        for r, row in enumerate(ids):
            tokens_RL[r, : len(row)], positions_RL[r, : len(row)] = torch.tensor(row), torch.arange(len(row))
        about = {"prompts": self.prompts, "tokens": self.tokens, "ends": ends}
        planes = {"tokens_RL": tokens_RL, "labels_RL": tokens_RL, "positions_RL": positions_RL}
        return [Part(name=material.name, **planes, groups_RL=tokens_RL, num_groups=0, about=about)]

    def ask(self, run: Run, part: Part, *, heartbeat: Callable[[], None]) -> Answered | None:
        """None: some rank was told to stop. Collective."""
        return answered(run, part, heartbeat=heartbeat)

    def result(self, measured: Sequence[Answered]) -> dict[str, Any]:
        [one] = measured
        rows = zip(one.prompts, one.answers, one.num_tokens, one.has_ended, strict=True)
        keys = ("prompt", "answer", "tokens", "ended")
        unended = 1 - sum(one.has_ended) / len(one.has_ended)
        return {"unended": unended, "answers": [dict(zip(keys, row, strict=True)) for row in rows]}


def answered(run: Run, part: Part, *, heartbeat: Callable[[], None]) -> Answered | None:
    padding = -part.tokens_RL.shape[1] % run.model.cut.multiple
    tokens_RL = torch.nn.functional.pad(part.tokens_RL, (0, padding))
    positions_RL = torch.nn.functional.pad(part.positions_RL, (0, padding), value=PADDING_POSITION)
    length_R = (positions_RL >= 0).sum(1)
    begun_R, is_over_R = length_R.clone(), torch.zeros(len(length_R), dtype=torch.bool)
    rows = torch.arange(len(length_R))
    with evaluating(run):
        for i in range(part.about["tokens"]):
            heartbeat()
            if i % ASK_EVERY == 0 and is_told_to_stop(run):
                return None
            next_R = likeliest(run, tokens_RL, positions_RL, length_R)
            going = rows[~is_over_R]
            tokens_RL[going, length_R[going]] = next_R[going]
            positions_RL[going, length_R[going]] = length_R[going]
            length_R[going] += 1
            is_over_R |= torch.isin(next_R, torch.tensor(part.about["ends"], dtype=torch.int64))
            if is_over_R.all():
                break
    spoken = [tokens_RL[r, begun_R[r] : length_R[r]].tolist() for r in range(len(rows))]
    ends, decode = part.about["ends"], run.stream.tokenizer.decode
    texts = [decode([t for t in answer if t not in ends], skip_special_tokens=False) for answer in spoken]
    return Answered(
        prompts=part.about["prompts"],
        answers=texts,
        num_tokens=[len(answer) for answer in spoken],
        has_ended=is_over_R.tolist(),
    )


def likeliest(run: Run, tokens_RL: Tensor, positions_RL: Tensor, length_R: Tensor) -> Tensor:
    """The token behind each row's last, on all ranks the same. Collective."""
    num_rows, length = tokens_RL.shape
    each = max(1, MAX_LOGITS // (length * run.config.model.vocab_size))
    own, next_R = run.model.cut.own, torch.full((num_rows,), -1)
    place_BL = own(torch.arange(length).expand(num_rows, -1))
    for start in range(0, num_rows, each):
        part = slice(start, start + each)
        tokens_BL, positions_BL = own(tokens_RL[part]), positions_RL[part]
        logits_BLV = run.model(device.onto(run.device, tokens_BL), device.onto(run.device, positions_BL))
        at, column = torch.nonzero(place_BL[part] == length_R[part, None] - 1, as_tuple=True)
        next_R[start + at] = logits_BLV[at.to(run.device), column.to(run.device)].argmax(-1).cpu()
    next_R = next_R.to(run.device)
    if run.groups.tokens is not None:  # of ranks that differ in a last digit, one is heard
        dist.all_reduce(next_R, op=dist.ReduceOp.MAX, group=run.groups.tokens)
    return next_R.cpu()
