"""Does the model find in a long text what it is asked for? MK-NIAH: several keys hidden, one of them asked.

After RULER (arXiv:2404.06654, "multi-keys"): a haystack of sentences, needles "the number of <key> is
<value>" at some depth, and at the end the question for one key. `haystack` is null for the hard form, in
which every sentence is a needle, or a source for the form in prose, in which `keys` needles lie.

An answer counts if greedy decoding would write it. That needs no decoding: it writes the answer if and only
if each token of the answer is the most likely one after the true tokens before it (by induction over the
tokens), so one forward pass over question and answer tells.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from trainer.config import ConfigError, Number, check_numbers
from trainer.evaluate.kernel import Measured
from trainer.evaluate.rows import Part, packed
from trainer.evaluate.sets import LIMITS, Material, in_order
from trainer.evaluate.tasks import answer_example, joined

NEEDLE = "The number of {key} is {value}."
QUESTION = "\nWhat is the number of {key}? The number of {key} is"
KINDS = (
    "amber bold calm damp early fresh green happy icy jolly kind loud mild neat old proud quick red shy tall"
)
THINGS = (
    "anchor bridge candle door engine forest garden harbor island jacket kettle lamp mirror needle orchard"
)
NAMES = [f"{kind} {thing}" for kind in KINDS.split() for thing in THINGS.split()]
NEEDLE_LIMITS = {
    "keys": Number(at_least=1, at_most=len(NAMES), why="there are as many names"),
    "digits": Number(at_least=1, at_most=30, why="an answer is a number"),
    "samples": Number(at_least=1, at_most=100_000, why="each is a row"),
    "seed": Number(at_least=0, at_most=2**63 - 1, why="generators take 63 bits"),
}


class Needles:
    """Exact answers by length and depth.

    lengths: [tokens] of question and answer; depths: [%] of the haystack before the needle that is asked;
    samples: for each pair. keys: needles of the form in prose. digits: of a value. Raises: ConfigError.
    """

    best = "missed"

    def __init__(
        self,
        lengths: list[int],
        depths: list[float] | None = None,
        samples: int = 10,
        keys: int = 4,
        digits: int = 7,
        haystack: Any = None,
        seed: int = 0,
        interval: int = 1000,
        at_start: bool = False,
    ) -> None:
        check_numbers(LIMITS, interval=interval)
        check_numbers(NEEDLE_LIMITS, keys=keys, digits=digits, samples=samples, seed=seed)
        self.lengths, self.depths = list(lengths), [0, 25, 50, 75, 100] if depths is None else list(depths)
        for length in self.lengths:
            check_numbers({"lengths": LIMITS["seq_len"]}, lengths=length)
        if not self.lengths or not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            raise ConfigError(f"lengths={lengths}, depths={depths}: give lengths, and depths from 0 to 100")
        self.samples, self.keys, self.digits, self.haystack = samples, keys, digits, haystack
        self.seed, self.interval, self.at_start = seed, interval, at_start

    def parts(self, material: Material) -> list[Part]:
        """One for each length. The groups are its depths' samples."""
        if material.tokenizer is None:
            raise ConfigError(f"evaluate.{material.name}: needles are text; set data.tokenizer")
        sentences = self.sentences(material)
        return [self.part(length, sentences, material) for length in self.lengths]

    def part(
        self, length: int, sentences: Callable[[random.Random], Iterator[str]], material: Material
    ) -> Part:
        examples = []
        for group, (depth, sample) in enumerate(self.grid()):
            draw = random.Random(f"{self.seed}/{length}/{depth}/{sample}")
            prompt, answer = self.question(length, depth, draw, sentences, material)
            ids, num_context = joined(material.tokenizer, prompt, answer)
            examples.append(answer_example(ids, len(ids) - num_context, group=group, seq_len=length))
        return packed(
            examples,
            name=f"{material.name}/{length}",
            seq_len=length,
            num_groups=len(examples),
            about={"length": length},
        )

    def grid(self) -> list[tuple[float, int]]:
        return [(depth, sample) for depth in self.depths for sample in range(self.samples)]

    def question(
        self,
        length: int,
        depth: float,
        draw: random.Random,
        sentences: Callable[[random.Random], Iterator[str]],
        material: Material,
    ) -> tuple[str, str]:
        """Prompt and answer, of at most `length` tokens together and as close to it as sentences allow."""
        pairs = draw_pairs(draw, self.keys, self.digits)
        asked = pairs[0].question, pairs[0].answer

        def size(text: str) -> int:
            return len(material.tokenizer.encode(text, add_special_tokens=False).ids)

        room = length - size(" ".join(pair.needle for pair in pairs) + "".join(asked))
        if room < 0:
            needed = length - room
            raise ConfigError(
                f"evaluate.{material.name}: lengths={length} has no room for {self.keys} needles and the "
                f"question; use {needed} or more, or fewer keys"
            )
        hay = haystack(sentences(draw), room=room, size=size)
        question, answer = asked
        return hide(pairs, hay, depth=depth, draw=draw) + question, answer

    def sentences(self, material: Material) -> Callable[[random.Random], Iterator[str]]:
        """An endless haystack, drawn anew for each sample."""
        if self.haystack is None:
            return partial(distractors, digits=self.digits)
        source = material.make_source(self.haystack)
        text = [
            line
            for document in in_order(source)
            for line in (document.text or "").split("\n")
            if line.strip()
        ]
        if not text:
            raise ConfigError(f"evaluate.{material.name}.haystack: has no line of text; use another source")

        def lines(draw: random.Random) -> Iterator[str]:
            start = draw.randrange(len(text))
            while True:
                yield text[start % len(text)].strip()
                start += 1

        return lines

    def result(self, measured: Sequence[Measured]) -> dict[str, Any]:
        rows, of_lengths, exact = list[dict[str, Any]](), dict[str, float](), 0
        for one in measured:
            is_exact_DS = (one.hits_G == one.targets_G).view(len(self.depths), self.samples)
            exact += int(is_exact_DS.sum())
            length, is_exact_DS = one.part.about["length"], is_exact_DS.double()
            of_lengths[f"exact_at_{length}"] = is_exact_DS.mean().item()
            for depth, share in zip(self.depths, is_exact_DS.mean(1).tolist(), strict=True):
                rows.append({"length": length, "depth": depth, "exact": share, "total": self.samples})
        share = exact / (len(measured) * len(self.grid()))
        return {"exact": share, "missed": 1 - share, **of_lengths, "needles": rows}


# -- texts --


class Pair(NamedTuple):
    """A key and its value."""

    key: str
    value: str

    @property
    def needle(self) -> str:
        return NEEDLE.format(key=self.key, value=self.value)

    @property
    def question(self) -> str:
        return QUESTION.format(key=self.key)

    @property
    def answer(self) -> str:
        return f" {self.value}."


def draw_pairs(draw: random.Random, count: int, digits: int) -> list[Pair]:
    """Of different keys."""
    return [Pair(name, draw_number(draw, digits)) for name in draw.sample(NAMES, count)]


def draw_number(draw: random.Random, digits: int) -> str:
    return "".join(draw.choices(string.digits, k=digits))


def distractors(draw: random.Random, digits: int) -> Iterator[str]:
    """Needles of keys that are never asked, without end."""
    while True:
        name = f"{draw.choice(KINDS.split())} {draw.choice(THINGS.split())} {draw.randrange(10**6)}"
        yield Pair(name, draw_number(draw, digits)).needle


class Haystack(NamedTuple):
    sentences: list[str]
    ends: list[int]  # [tokens] before, between and behind them


def haystack(sentences: Iterator[str], *, room: int, size: Callable[[str], int]) -> Haystack:
    """As many of them as `room` tokens hold."""
    hay = Haystack([], [0])
    for sentence in sentences:
        end = hay.ends[-1] + size(f" {sentence}")
        if end > room:
            break
        hay.sentences.append(sentence)
        hay.ends.append(end)
    return hay


def hide(pairs: Sequence[Pair], hay: Haystack, *, depth: float, draw: random.Random) -> str:
    """A text with the first needle at `depth` [%] of the haystack, and the others anywhere."""
    at_depth = min(range(len(hay.ends)), key=lambda n: abs(hay.ends[n] - depth / 100 * hay.ends[-1]))
    places = [at_depth, *(draw.randint(0, len(hay.sentences)) for _ in pairs[1:])]
    text = list(hay.sentences)
    needles = (pair.needle for pair in pairs)
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):  # from the end
        text.insert(place, needle)
    return " ".join(text)
