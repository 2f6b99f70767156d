"""Which documents are drawn by their length, before anybody has tokenised them?

    keep probability: at_short up to `short` tokens, at_long from `long` tokens on, in between linear in the
    logarithm of the length

The report (arXiv:2602.17004, section 4) has the two ends, 1 % and 90 % at 128K tokens and more; where 1 %
ends and the line between are our assumption. A hash of (seed, source, number of the document over the run)
draws, so a document is drawn or not whichever rank, worker or restart comes to it, and anew in every epoch.

A text is as long as its UTF-8 bytes over `bytes_per_token`: what is not drawn is never tokenised. Where a
source gives tokens, they are counted.
"""

import math
from dataclasses import dataclass

import xxhash

RANGE = 2**64  # of the hash
NOT_DRAWN = "not_drawn"  # what a document that is passed over for its length counts as
LEAST = 0.01  # of all documents: how few may be drawn before a whole source looks empty


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Of one source. short, long: [tokens]. at_short, at_long: keep probabilities."""

    short: float = 8192
    long: float = 131_072
    at_short: float = 0.01
    at_long: float = 0.9
    bytes_per_token: float = 4.0

    def probability(self, length: float) -> float:
        """Of a document of so many tokens to be drawn."""
        if length <= self.short:
            return self.at_short
        if length >= self.long:
            return self.at_long
        done = math.log(length / self.short) / math.log(self.long / self.short)
        return self.at_short + (self.at_long - self.at_short) * done

    def draws(self, length: float, *, seed: int, source: str, number: int) -> bool:
        """number: of the document in its source, over all epochs."""
        key = f"{seed} {source} {number}".encode()
        return xxhash.xxh3_64_intdigest(key) < self.probability(length) * RANGE

    @property
    def least(self) -> float:
        """The smallest probability that is not too small to wait for."""
        return max(LEAST, min(self.at_short, self.at_long))
