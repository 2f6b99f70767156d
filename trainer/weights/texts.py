"""What stands beside the weights: config.json, generation_config.json and the tokenizer, as transformers
reads them.
"""

from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.data import load_tokenizer, roles
from trainer.model.hf import FIXED, hf_config
from trainer.program import program_of
from trainer.weights.tensors import write_json

TOKENIZER = "tokenizer.json"
# in the published config.json files; read by others
OLDER = ("score_func", "route_norm", "n_group", "topk_group")


def positions(config: Config, *, tokens: int) -> int:
    """[tokens] of the longest row that the run was trained on, when it had seen this many tokens."""
    return max(span.now.seq_len for span in program_of(config).spans if span.start < max(tokens, 1))


def tokenizer_of(checkpoint: Path, config: Config) -> Any:
    """The run's tokenizer, None if its source has tokens. Raises: ValueError."""
    path = checkpoint / TOKENIZER
    return (
        load_tokenizer(str(path), source={}, vocab_size=config.model.vocab_size) if path.is_file() else None
    )


def write_texts(
    directory: Path, *, checkpoint: Path, config: Config, dtype: str, tokens: int, tokenizer: Any
) -> None:
    """dtype: of the weights. tokens: that the run had seen."""
    length = positions(config, tokens=tokens)
    role_of = roles(tokenizer) if tokenizer is not None else {}
    ids = {f"{role}_token_id": i for role, (_, i) in sorted(role_of.items())}
    shape = hf_config(config.model, max_position_embeddings=length)
    older = {name: FIXED[name] for name in OLDER} | {"rope_theta": config.model.rope_theta}
    write_json(
        directory / "config.json",
        {**shape, "model_type": FIXED["model_type"], "dtype": dtype, **older, **ids},
    )
    write_json(directory / "generation_config.json", ids)
    if tokenizer is None:
        return
    (directory / TOKENIZER).write_bytes((checkpoint / TOKENIZER).read_bytes())
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": token for role, (token, _) in role_of.items()},
        },
    )
