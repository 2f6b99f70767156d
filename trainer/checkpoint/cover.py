"""Do the pieces of a tensor hold each of its elements exactly once?

One pass over the pieces, whatever their layout. Element (i, j, ...) stands for the monomial x^i y^j ..., so a
piece is a product of geometric sums, and a set of pieces a polynomial whose coefficients say how often each
element is held. The pieces hold each element once if and only if that polynomial is the one of the whole
tensor. Both are compared at a point drawn anew, modulo a prime: for right pieces they are always equal, for
wrong ones with a probability of at most sum(shape) / PRIME, 1e-12 for a million rows (Schwartz and Zippel,
https://en.wikipedia.org/wiki/Schwartz-Zippel_lemma).
"""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import prod

PRIME = 2**61 - 1
draw = random.SystemRandom()  # a layout cannot be made to fit the point

Box = tuple[Sequence[int], Sequence[int]]  # (offsets, sizes)


def uncovered(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """What is wrong with boxes that are to cut up a tensor; None: they hold each element exactly once."""
    boxes = list(boxes)
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return f"a piece at {tuple(offsets)} of sizes {tuple(sizes)}, but its shape is {tuple(shape)}"
        if any(o < 0 or n < 1 or o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            return f"a piece at {tuple(offsets)} of sizes {tuple(sizes)} lies outside of {tuple(shape)}"
    held, whole = sum(prod(sizes) for _, sizes in boxes), prod(shape)
    if held != whole:
        return f"the checkpoint's pieces hold {held} of the {whole} values"
    if len(boxes) <= 1 or _once(shape, boxes):
        return None
    return "the checkpoint's pieces overlap: some values are held twice, others not at all"


def _once(shape: Sequence[int], boxes: list[Box]) -> bool:
    power_of = [cache(_powers(draw.randrange(2, PRIME - 1))) for _ in shape]

    def value(offsets: Sequence[int], sizes: Sequence[int]) -> int:
        """Of the box's polynomial times (x - 1)(y - 1)..., which all of them have in common."""
        product = 1
        for power, offset, size in zip(power_of, offsets, sizes, strict=True):
            product = product * (power(offset + size) - power(offset)) % PRIME
        return product

    return sum(value(*box) for box in boxes) % PRIME == value([0] * len(shape), shape)


def _powers(base: int) -> Callable[[int], int]:
    return lambda exponent: pow(base, exponent, PRIME)
