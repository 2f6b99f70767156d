"""What stands beside the weights: config.json, generation_config.json, the tokenizer and its chat template,
as transformers reads them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint import write_durably
from trainer.config import Config
from trainer.data import load_tokenizer, roles
from trainer.model.hf import FIXED, hf_config
from trainer.program import program_of
from trainer.weights.tensors import write_json

TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# what ends a turn, by the names that published templates give it
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|eot|>", "<|end|>")
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


def end_of_turn(tokenizer: Any, template: str | None) -> tuple[str, int] | None:
    """The control token that ends a turn in this chat template, and its id."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return next(
        ((name, special[name]) for name in END_OF_TURN if name in special and name in (template or "")), None
    )


def endings(tokenizer: Any, template: str | None) -> dict[str, list[tuple[str, int]]]:
    """{role: tokens and their ids}. Where turns are taken, the end of a turn is the first eos. What has no
    pad token pads with the end of the text.
    """
    named = {role: [token] for role, token in roles(tokenizer).items()}
    turn = end_of_turn(tokenizer, template)
    return {"pad": named["eos"], **named, "eos": [*([turn] if turn else []), *named["eos"]]}


def write_texts(
    directory: Path, *, checkpoint: Path, config: Config, dtype: str, tokens: int, tokenizer: Any
) -> None:
    """dtype: of the weights. tokens: that the run had seen."""
    length = positions(config, tokens=tokens)
    template = checkpoint / TEMPLATE
    text = template.read_text("utf-8") if template.is_file() else None
    of_role = endings(tokenizer, text) if tokenizer is not None else {}
    shape = hf_config(config.model, max_position_embeddings=length)
    older = {name: FIXED[name] for name in OLDER} | {"rope_theta": config.model.rope_theta}
    write_json(
        directory / "config.json",
        {**shape, "model_type": FIXED["model_type"], "dtype": dtype, **older, **model_ids(of_role)},
    )
    ids = {f"{role}_token_id": [i for _, i in tokens] for role, tokens in sorted(of_role.items())}
    write_json(directory / "generation_config.json", {key: i if i[1:] else i[0] for key, i in ids.items()})
    if tokenizer is None:
        return
    (directory / TOKENIZER).write_bytes((checkpoint / TOKENIZER).read_bytes())
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "clean_up_tokenization_spaces": False,
            **{f"{role}_token": tokens[0][0] for role, tokens in of_role.items()},
        },
    )
    if text is not None:
        write_durably(directory / TEMPLATE, text)


def model_ids(of_role: Mapping[str, list[tuple[str, int]]]) -> dict[str, int | None]:
    """Of config.json. A pad token there has no gradient in transformers, so what is not padding alone must
    not be called so: who trains on would never move the row of the end of the text. It is null then, as some
    readers ask for it.
    """
    first = {role: tokens[0][1] for role, tokens in sorted(of_role.items())}
    shared = [i for role, tokens in of_role.items() if role != "pad" for _, i in tokens]
    pad = first.pop("pad", None)
    return {f"{role}_token_id": i for role, i in first.items()} | {
        "pad_token_id": None if pad in shared else pad
    }
