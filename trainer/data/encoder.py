"""stub"""
import numpy as np


class Encoder:
    def __init__(self, tokenizer, *, backend="tokenizers", check_every=1000):
        self.tokenizer = tokenizer
    def __call__(self, texts):
        return [np.array(e.ids, np.uint32) for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
