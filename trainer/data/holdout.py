"""Which documents are held out: never trained on, so that an evaluation may use them?

The hash of its content decides. So a document is on the same side in every run, its copies are on that side
too, and the side does not change when files are added, renamed or put into another order.
"""

import numpy as np
import xxhash

from trainer.data.sources import Document

RANGE = 2**64  # of the hash
HELD_OUT = "held_out"  # what a document that is held out counts as


def content_hash(document: Document) -> int:
    """Of its text, also where it was tokenised before, or of its tokens."""
    if document.content is not None:
        return document.content
    if document.text is not None:
        content = document.text.encode(errors="surrogatepass")
    else:
        content = document.tokens.astype("<u4").tobytes()
    return xxhash.xxh3_64_intdigest(content)


def is_held_out(document: Document, *, share: float) -> bool:
    """share: of all documents, between 0 and 1."""
    return share > 0 and content_hash(document) < share * RANGE


def may_be_held_out(content_D: np.ndarray, share: float) -> np.ndarray:
    """Of many hashes: True for each that is held out, and perhaps for one that is a rounding away."""
    return content_D.astype(np.float64) <= share * RANGE if share else np.zeros(len(content_D), bool)
