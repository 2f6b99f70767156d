"""Does the model prefer the right answer? Multiple choice and cloze, scored by the likelihood of each choice.

A task is a file of JSON lines:

    {"context": "The capital of France is", "choices": [" Paris", " Rome"], "gold": 0}
    {"context": "2 + 2 =", "choices": [" 4"]}                          one choice: cloze, gold is 0

Context and choice are joined as they are, so a choice begins with its own space. They are cut into tokens as
lm-evaluation-harness does it: spaces at the end of the context go to the choice, and the choice's tokens are
those of the joined text behind as many as the context has alone.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from trainer.config import ConfigError, check_numbers
from trainer.evaluate.kernel import Measured
from trainer.evaluate.rows import Example, Part, packed
from trainer.evaluate.sets import LIMITS, Material


class Question(NamedTuple):
    context: str
    choices: list[str]
    gold: int


class Task:
    """One file of questions. best: bits per byte of the right answers, smoother than accuracy.

    interval: [steps]; limit: so many questions of the file, null: all; seq_len: of a row, null: that of the
    run; of a longer question the last tokens are kept. Raises: ConfigError.
    """

    best = "bits_per_byte"

    def __init__(
        self,
        path: str,
        interval: int = 200,
        limit: int | None = None,
        seq_len: int | None = None,
        at_start: bool = True,
    ) -> None:
        check_numbers(LIMITS, interval=interval, seq_len=seq_len or LIMITS["seq_len"].at_least)
        self.path, self.interval, self.limit = path, interval, limit
        self.seq_len, self.at_start = seq_len, at_start

    def parts(self, material: Material) -> list[Part]:
        if material.tokenizer is None:
            raise ConfigError(f"evaluate.{material.name}: a task is text; set data.tokenizer")
        questions = list(questions_of(Path(self.path).expanduser()))[: self.limit]
        seq_len = self.seq_len or material.seq_len
        examples = list(examples_of(questions, material, seq_len=seq_len))
        about = {
            "bytes": [[len(choice.encode()) for choice in question.choices] for question in questions],
            "gold": [question.gold for question in questions],
        }
        part = packed(examples, name=material.name, seq_len=seq_len, num_groups=len(examples), about=about)
        return [part]

    def result(self, measured: Sequence[Measured]) -> dict[str, Any]:
        [one] = measured
        about, start, right, right_per_byte, exact = one.part.about, 0, 0, 0, 0
        nats = tokens = num_bytes = 0.0
        for gold, sizes in zip(about["gold"], about["bytes"], strict=True):
            choices = slice(start, start + len(sizes))
            start += len(sizes)
            loss_C, targets_C, hits_C = one.loss_G[choices], one.targets_G[choices], one.hits_G[choices]
            right += int(loss_C.argmin()) == gold
            right_per_byte += int((loss_C / torch.tensor(sizes)).argmin()) == gold
            exact += int(hits_C[gold] == targets_C[gold])
            nats, tokens = nats + loss_C[gold].item(), tokens + targets_C[gold].item()
            num_bytes += sizes[gold]
        count = len(about["gold"])
        values = {
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "loss": nats / tokens,
            "exact": exact / count,
        }
        if any(len(sizes) > 1 for sizes in about["bytes"]):
            values |= {"accuracy": right / count, "accuracy_per_byte": right_per_byte / count}
        return values | {"questions": count}


def questions_of(path: Path) -> Iterator[Question]:
    """Raises: ConfigError with file, line and remedy."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"path={path}: cannot be read ({reason}); give a file of JSON lines") from error
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield question_of(line, where=f"{path}:{number}")
    if not number:
        raise ConfigError(f"path={path}: is empty; give a line for each question")


def question_of(line: str, *, where: str) -> Question:
    example = '{"context": "2 + 2 =", "choices": [" 4", " 5"], "gold": 0}'
    try:
        record = json.loads(line)
        context, choices, gold = record["context"], record["choices"], record.get("gold", 0)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is no JSON object ({error}); write one like {example}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: lacks {error}; write one like {example}") from None
    if not (isinstance(context, str) and isinstance(choices, list) and choices):
        raise ConfigError(f"{where}: context must be a text and choices a list of texts, like {example}")
    if not all(isinstance(choice, str) and choice for choice in choices):
        raise ConfigError(
            f"{where}: choices={choices}: each must be a text that is not empty, like {example}"
        )
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise ConfigError(f"{where}: gold={gold!r}: must be the number of a choice, 0 to {len(choices) - 1}")
    return Question(context, choices, gold)


def examples_of(questions: Sequence[Question], material: Material, *, seq_len: int) -> Iterator[Example]:
    """One for each choice, in their order; the group of its tokens is its number."""
    group = 0
    for number, question in enumerate(questions, start=1):
        for choice in question.choices:
            ids, num_context = joined(material.tokenizer, question.context, choice)
            if not num_context:
                remedy = "give every question a context of a token or more"
                raise ConfigError(f"evaluate.{material.name}: question {number} has no context; {remedy}")
            num_answer = len(ids) - num_context
            if not 0 < num_answer <= seq_len:
                remedy = f"seq_len={num_answer} or more" if num_answer else "a choice that adds a token"
                raise ConfigError(
                    f"evaluate.{material.name}: {choice[:40]!r} of question {number} has {num_answer} tokens "
                    f"and a row {seq_len}; use {remedy}"
                )
            yield answer_example(ids, num_answer, group=group, seq_len=seq_len)
            group += 1


def joined(tokenizer: Tokenizer, context: str, choice: str) -> tuple[list[int], int]:
    """The tokens of both, and how many of them are the context's."""
    bare = context.rstrip(" ")
    whole = tokenizer.encode(context + choice, add_special_tokens=False).ids
    return whole, len(tokenizer.encode(bare, add_special_tokens=False).ids)


def answer_example(ids: list[int], num_answer: int, *, group: int, seq_len: int) -> Example:
    """Labels are the last `num_answer` tokens; of what is longer than a row, the end is kept."""
    tokens_T = torch.tensor(ids[-(seq_len + 1) :])
    groups_T = torch.full_like(tokens_T, -1)
    groups_T[-num_answer:] = group
    return Example(tokens_T, groups_T)
