"""Which documents teach a model to find needles? Questions of `Needles` with other draws, and their answers.

A document is a haystack and then `questions` for its needles, answered one after another. Every second
haystack is the hard form of `Needles`, whose sentences are needles of keys that are never asked; in the
others any needle may be asked. Only questions and answers are learned: nothing tells what a haystack will
hold.
"""

import random
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from trainer.config import ConfigError, Number, check_numbers
from trainer.data import Document, end_of_text_id
from trainer.evaluate.needles import (
    NAMES,
    NEEDLE_LIMITS,
    Pair,
    distractors,
    draw_number,
    draw_pairs,
    haystack,
    hide,
)

LIMITS = {
    **{key: NEEDLE_LIMITS[key] for key in ("keys", "digits", "seed")},
    "length": Number(at_least=1, at_most=2**24, why="a document is made at once"),
    "questions": Number(at_least=1, at_most=len(NAMES), why="there are as many keys"),
    "num_documents": Number(at_least=1, at_most=10**8, why="the order of an epoch takes 16 bytes a document"),
}
TRIED = 100  # documents whose needles and questions are measured before the run


class NeedleSource:
    """Document i is a function of (seed, i) and the tokenizer.

    length: [tokens] of a document, or a few less. questions: of each document. keys: of the needles from
    which they are chosen. Before it has a tokenizer it gives short texts of the same words to train one on.
    """

    masks = True

    def __init__(
        self,
        length: int,
        questions: int = 1,
        keys: int = 3,
        digits: int = 2,
        num_documents: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        check_numbers(
            LIMITS,
            length=length,
            questions=questions,
            keys=keys,
            digits=digits,
            num_documents=num_documents,
            seed=seed,
        )
        if questions > keys:
            raise ConfigError(f"questions={questions}: there are keys={keys}; ask for each of them once")
        self.length, self.questions, self.keys, self.digits = length, questions, keys, digits
        self.num_documents, self.seed = num_documents, seed
        self.tokenizer: Tokenizer | None = None
        self.fingerprint = f"needles {length} {questions} {keys} {digits} {num_documents} {seed}"

    def bind(self, tokenizer: Tokenizer | None, spec: str | None) -> None:
        """Raises: ValueError."""
        if tokenizer is None:
            raise ValueError("data.tokenizer=null: needles are text; use data.tokenizer=train")
        self.tokenizer = tokenizer
        least = max(self.least(self.pairs(self.draw(i))) for i in range(TRIED))
        if least > self.length:
            raise ValueError(
                f"length={self.length} has no room for {self.keys} needles and {self.questions} questions; "
                f"use {least} or more, or fewer of them"
            )

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, i: int) -> Document:
        draw, where = self.draw(i), f"needles:{i}"
        pairs = self.pairs(draw)
        if self.tokenizer is None:
            hard = next(distractors(draw, self.digits))
            return Document(where, text=f"{pairs[0].needle} {hard}{self.answered(pairs)}")
        sentences = self.others(pairs, draw) if i % 2 else distractors(draw, self.digits)
        hay = haystack(sentences, room=self.length - self.least(pairs), size=self.size)
        text = hide(pairs, hay, depth=draw.uniform(0, 100), draw=draw)
        encoding = self.tokenizer.encode(text + self.answered(pairs), add_special_tokens=False)
        is_learned = [start > len(text) for start, _ in encoding.offsets]
        ids = np.array([*encoding.ids, end_of_text_id(self.tokenizer)], np.uint32)
        return Document(where, tokens=ids, mask=np.array([*is_learned, False]))

    def draw(self, i: int) -> random.Random:
        return random.Random(f"{self.seed}/document {i}")

    def pairs(self, draw: random.Random) -> list[Pair]:
        return draw_pairs(draw, self.keys, self.digits)

    def others(self, pairs: Sequence[Pair], draw: random.Random) -> Iterator[str]:
        """Needles of all keys but these."""
        names = sorted(set(NAMES) - {pair.key for pair in pairs})
        draw.shuffle(names)
        return (Pair(name, draw_number(draw, self.digits)).needle for name in names)

    def answered(self, pairs: Sequence[Pair]) -> str:
        return "".join(pair.question + pair.answer for pair in pairs[: self.questions])

    def least(self, pairs: Sequence[Pair]) -> int:
        """[tokens] of a document without a haystack, its end of text included."""
        return self.size(" ".join(pair.needle for pair in pairs) + self.answered(pairs)) + 1

    def size(self, text: str) -> int:
        assert self.tokenizer is not None
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)
