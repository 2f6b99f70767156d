"""Writes the three task files beside it: the same lines every time.

python -m tests.tasks
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

NUM_QUESTIONS = 40
OPENING = {"(": ")", "[": "]", "{": "}"}


def arithmetic(draw: random.Random) -> Iterator[dict]:
    """Multiple choice with choices of different lengths."""
    for _ in range(NUM_QUESTIONS):
        a, b = draw.randrange(60), draw.randrange(60)
        wrong = draw.sample([n for n in range(120) if n != a + b], 3)
        choices = draw.sample([a + b, *wrong], 4)
        yield {
            "context": f"{a} + {b} =",
            "choices": [f" {n}" for n in choices],
            "gold": choices.index(a + b),
        }


def brackets(draw: random.Random) -> Iterator[dict]:
    """Which bracket closes the line? Contexts that end with a space, which belongs to the choice."""
    for _ in range(NUM_QUESTIONS):
        opening = draw.choice(list(OPENING))
        names = " ".join(draw.sample(["alpha", "beta", "gamma", "delta"], draw.randint(1, 3)))
        yield {
            "context": f"x = {opening} {names} ",
            "choices": list(OPENING.values()),
            "gold": list(OPENING).index(opening),
        }


def repeat(draw: random.Random) -> Iterator[dict]:
    """Cloze, beyond ASCII: the word that was said before."""
    for _ in range(NUM_QUESTIONS):
        word = draw.choice(["übung", "naïve", "東京", "кот", "plain", "→"])
        yield {"context": f"Say {word}. I say", "choices": [f" {word}"]}


if __name__ == "__main__":
    for task in (arithmetic, brackets, repeat):
        lines = [json.dumps(question, ensure_ascii=False) for question in task(random.Random(task.__name__))]
        Path(__file__).with_name(f"{task.__name__}.jsonl").write_text(
            "\n".join(lines) + "\n", encoding="utf-8"
        )
