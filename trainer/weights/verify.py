"""Does transformers compute from what was exported what our model computes from the checkpoint?

Our side is filled from the checkpoint by another way than the export (read_whole), and rounded to the
exported dtype. So both sides hold the same weights exactly, and both compute in float32: what is left are
sums in another order.

Letters: B rows, L tokens each, V vocabulary.
"""

import argparse
import inspect
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import read_index, read_whole
from trainer.config import Config, ConfigError
from trainer.model.afmoe import Afmoe, afmoe_config
from trainer.model.hf import BIAS, are_aligned, rows_are_aligned
from trainer.model.init import initialize
from trainer.weights.tensors import IN_CHECKPOINT

TEXTS = (argparse, inspect)  # real text that every Python has
MAX_LENGTH = 256  # [tokens] of a row
NUM_NEW = 16  # [tokens] that both sides continue each row's beginning with
LIMIT = 2**10 * torch.finfo(torch.float32).eps  # [largest logit] = 1.2e-4; measured: docs/weights.md


class VerifyError(ValueError):
    """What was exported is not the checkpoint's model; the message says how far it is off."""


def need_transformers(what: str = "--verify and --prompt") -> None:
    """Raises: ConfigError."""
    if find_spec("transformers") is None:
        raise ConfigError(f"{what} need transformers: pip install 'triquetra[chat]'")


@torch.no_grad()
def compare(checkpoint: Path, config: Config, exported: Path, *, dtype: torch.dtype, tokenizer: Any) -> str:
    """What was compared, in words. Raises: VerifyError."""
    tokens_BL = text_tokens(config, tokenizer)
    ours = our_model(checkpoint, config, dtype=dtype)
    theirs = their_model(exported)
    logits_BLV = ours(tokens_BL)
    difference = (logits_BLV - theirs(tokens_BL).logits).abs().max().item()
    limit = LIMIT * logits_BLV.abs().max().item()
    rows, length = tokens_BL.shape
    kind = "" if rows_are_aligned(config.model) else " eager experts"
    comparison = (
        f"logits of {rows} x {length} tokens differ from transformers'{kind} by at most {difference:.2g} "
        f"(limit {limit:.2g})"
    )
    if not difference <= limit:  # a NaN is none, either
        raise VerifyError(f"{comparison}: the exported weights are not those of {checkpoint}")
    begun_BL = tokens_BL[:, : max(1, length // 2)]
    our_tokens = greedy(ours, begun_BL)
    their_tokens = continued(theirs, begun_BL, NUM_NEW, do_sample=False, eos_token_id=None)
    if our_tokens != their_tokens:
        raise VerifyError(
            f"{comparison}, but {NUM_NEW} tokens after each row's first {begun_BL.shape[1]} do: "
            f"{our_tokens}, theirs {their_tokens}"
        )
    return f"verified: {comparison}, {NUM_NEW} greedy tokens are the same"


def text_tokens(config: Config, tokenizer: Any) -> Tensor:
    """(B, L) of Python's standard library; random ones for a run without tokenizer."""
    length = min(config.seq_len, MAX_LENGTH)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(config.model.vocab_size, (len(TEXTS), length), generator=generator)
    texts = [
        tokenizer.encode(inspect.getsource(module), add_special_tokens=False).ids[:length] for module in TEXTS
    ]
    return torch.tensor(texts)


def our_model(checkpoint: Path, config: Config, *, dtype: torch.dtype) -> Afmoe:
    """In float32, whole, with the checkpoint's weights rounded to `dtype`."""
    with torch.device("meta"):
        model = afmoe_config(
            replace(config.model, expert_dtype="float32", router_dtype="float32"), flex=False
        ).build()
    initialize(model, device=torch.device("cpu"), seed=0)
    state = read_whole(
        checkpoint, [name for name in read_index(checkpoint) if name.startswith(IN_CHECKPOINT)]
    )
    rounded = {
        name: tensor if name.endswith(BIAS) else tensor.to(dtype).float() for name, tensor in state.items()
    }
    model.load_state_dict({name.removeprefix(IN_CHECKPOINT): tensor for name, tensor in rounded.items()})
    return model.eval()


def their_model(exported: Path, dtype: torch.dtype | str = torch.float32) -> Any:
    """transformers' own class, with its default experts where it can run them. dtype: "auto": as written.

    Raises: VerifyError if a tensor is not used, or made up.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging as their_logging

    their_logging.disable_progress_bar()
    # it takes SDPA where flash attention is missing, and says so
    logging.getLogger("transformers").setLevel(logging.ERROR)
    load: Any = AutoModelForCausalLM.from_pretrained
    shape = AutoConfig.from_pretrained(exported)
    rows = (shape.hidden_size, getattr(shape, "moe_intermediate_size", 0))
    experts = {} if are_aligned(*rows) else {"experts_implementation": "eager"}
    model, report = load(exported, dtype=dtype, output_loading_info=True, **experts)
    if any(report.values()):
        raise VerifyError(f"transformers does not load {exported} as it is: {report}")
    return model.eval()


def greedy(model: Afmoe, tokens_BL: Tensor) -> list[list[int]]:
    """The likeliest next token, NUM_NEW times."""
    length = tokens_BL.shape[1]
    for _ in range(NUM_NEW):
        tokens_BL = torch.cat([tokens_BL, model(tokens_BL)[:, -1:].argmax(dim=-1)], dim=1)
    return tokens_BL[:, length:].tolist()


def continued(model: Any, tokens_BL: Tensor, max_new_tokens: int, **options: Any) -> list[list[int]]:
    """What transformers' own `generate` adds."""
    window = getattr(model.config, "sliding_window", None)
    out_BL = model.generate(
        tokens_BL,
        attention_mask=torch.ones_like(tokens_BL),
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        use_cache=window is None or window > 1,  # a cache for a window of one token holds none
        **options,
    )
    return out_BL[:, tokens_BL.shape[1] :].tolist()


@torch.no_grad()
def continuation(exported: Path, prompt: str, *, max_new_tokens: int = 40) -> str:
    """`prompt` and what follows it, drawn from the likelier tokens, the same each time: greedily a small
    model repeats itself. Tokenizer, weights and `generate` are transformers' alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exported)
    tokens_BL = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not tokens_BL.numel():
        tokens_BL = torch.tensor([[tokenizer.eos_token_id]])  # an empty text begins where a document ended
    torch.manual_seed(0)
    new_BL = continued(
        their_model(exported),
        tokens_BL.long(),
        max_new_tokens,
        do_sample=True,
        temperature=0.8,
        top_k=50,
    )
    return prompt + tokenizer.decode(new_BL[0], skip_special_tokens=True)
