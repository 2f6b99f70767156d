"""How does a new run start from the weights of a published AfmoeForCausalLM?

    init_from=DIRECTORY    model.safetensors, or model.safetensors.index.json and its files;
                           config.json; perhaps tokenizer.json
    init_from=owner/name   the same, from the hub, fetched by one rank of each host

An index says under our names where each expert's matrix lies; torch's DCP then fills the model on any layout,
each rank its part. Nothing that could run code is read: no pickle, no Python file of the directory.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoint import (
    DamagedError,
    StoredTensor,
    TensorPiece,
    TensorSpec,
    load_into,
    plain_name,
    read_header,
    read_index,
    read_json,
    reading,
    refuse_uncovered,
)
from trainer.config import Config, ConfigError, ModelConfig
from trainer.data import load_tokenizer
from trainer.model.hf import KEYS, config_misfits, our_shapes, places, refuse_misfits
from trainer.ranks.agree import (
    all_gather_objects,
    broadcast_object,
    refuse_disagreement,
    refusing_on_all,
    turn_on_host,
)

SINGLE, SEVERAL = "model.safetensors", "model.safetensors.index.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
VOCABULARY = ("model.tok_embeddings.weight", "model.lm_head.weight")  # a row for each token
FETCHED = ["*.safetensors", "*.json", "*.jinja"]


def refuse_early(config: Config) -> None:
    """What can be told before anything is built. Raises: ConfigError."""
    if config.init_from is None:
        return
    directory = Path(config.init_from).expanduser()
    if config.data.tokenizer == "train" and (directory / "tokenizer.json").is_file():
        raise ConfigError(
            f"data.tokenizer=train, but init_from={config.init_from} has a tokenizer that its "
            "weights belong to; "
            f"use data.tokenizer={directory / 'tokenizer.json'}"
        )


def start_from(config: Config, state: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Fills the model's part of a run's state with the weights of config.init_from. Collective.

    tokenizer: of the run; None if its source has tokens. Raises: ConfigError, on all ranks; before anything
    is loaded.
    """
    key = f"init_from={config.init_from}"
    directory = fetched(config.init_from)
    refusals = (ConfigError, DamagedError, OSError, ValueError)

    def checked_index() -> dict[str, StoredTensor]:
        try:
            model = refuse_other_model(directory, config.model)
            refuse_other_tokenizer(directory, tokenizer, config)
            return with_new_rows(index_of(directory, model), config.model)
        except refusals as error:
            raise ConfigError(f"{key}: {error}") from error

    index = broadcast_object(refusing_on_all(checked_index))
    refuse_disagreement(sizes(directory, index))
    return load_into(state, directory=directory, index=index)


def weights_of_run(config: Config, state: dict[str, Any], checkpoint: Path, tokenizer: Any) -> dict[str, Any]:
    """Fills the model's part of a run's state with the weights of another run's checkpoint. Collective.

    Raises: ConfigError, on all ranks; before anything is loaded.
    """

    def checked_index() -> dict[str, StoredTensor]:
        try:
            refuse_other_tokenizer(checkpoint, tokenizer, config)
            index = {name: one for name, one in read_index(checkpoint).items() if name.startswith("model.")}
            return with_new_rows(index, config.model)
        except (DamagedError, OSError, ValueError) as error:
            raise ConfigError(f"branch={config.branch}: {error}") from error

    index = broadcast_object(refusing_on_all(checked_index))
    refuse_disagreement(sizes(checkpoint, index))
    return load_into(state, directory=checkpoint, index=index)


def with_new_rows(index: Mapping[str, StoredTensor], model: ModelConfig) -> dict[str, StoredTensor]:
    """Embedding and head may have rows that the files lack, of new control tokens: these stay as they were
    initialised, the same on every layout, as nothing is read for them.
    """
    grown = dict(index)
    for name in (name for name in VOCABULARY if name in index):
        num_rows, dim = index[name].shape
        grown[name] = replace(index[name], shape=(max(num_rows, model.vocab_size), dim))
    return grown


def fetched(spec: str) -> Path:
    """The directory, on this host. Collective. Raises: ConfigError, on all ranks."""
    path, problem = Path(spec).expanduser(), None
    for turn in (0, 1):  # the first rank of a host fetches from the hub, the others find it in the cache
        if turn == turn_on_host():
            try:
                path = directory_of(spec)
            except ConfigError as error:
                problem = str(error)
        if refusal := next(filter(None, all_gather_objects(problem)), None):
            raise ConfigError(refusal)
    return path


def directory_of(spec: str, *, key: str = "init_from=") -> Path:
    """key: before the name in what is refused. Raises: ConfigError."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(spec) or path.exists():
        raise ConfigError(f"{key}{spec}: must be a directory with {SINGLE}, or a hub name like owner/name")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(spec, allow_patterns=FETCHED))
    except Exception as error:  # a dozen kinds: no network, no such name, no access
        remedy = "check the name, the network and HF_HUB_OFFLINE, or give a directory"
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{key}{spec}: no such directory, and the hub does not give it ({said}); {remedy}"
        ) from error


def refuse_other_model(directory: Path, model: ModelConfig) -> ModelConfig:
    """The model of config.json: this one, perhaps with fewer rows in embedding and head. Raises: ConfigError,
    ValueError.
    """
    if (directory / "checkpoints").is_dir() or (directory / "manifest.json").is_file():
        raise ConfigError(f"{directory} is a run's; use branch={directory}, or export it: triquetra export")
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: it must be a directory of AfmoeForCausalLM weights")
    theirs = read_json(path)
    if theirs.get("model_type") != "afmoe":
        raise ConfigError(f"{path}: model_type={theirs.get('model_type')}, must be afmoe")
    num_rows = theirs.get("vocab_size")
    if type(num_rows) is int and 0 < num_rows < model.vocab_size:
        model = replace(model, vocab_size=num_rows)
    with reading(path):
        wrong = config_misfits(theirs, model)
    if wrong:
        values = {key: theirs[name] for key, name in KEYS.items() if name in theirs}
        fits = " ".join(
            f"model.{key}={value}" for key, value in values.items() if value != getattr(model, key)
        )
        raise ConfigError(
            "\n".join([f"{path} is of another model:", *wrong, *([f"use {fits}"] if fits else [])])
        )
    return model


def refuse_other_tokenizer(directory: Path, tokenizer: Any, config: Config) -> None:
    """Raises: ConfigError, ValueError if the directory has a tokenizer and it is not the run's, which may
    have more control tokens.
    """
    path = directory / "tokenizer.json"
    if tokenizer is None or not path.is_file():
        return
    more = {"vocab_size": config.model.vocab_size, "control_tokens": config.data.control_tokens}
    if load_tokenizer(str(path), source={}, **more).to_str() != tokenizer.to_str():
        raise ConfigError(f"the run's tokenizer is not that of the weights; use data.tokenizer={path}")


def index_of(directory: Path, model: ModelConfig) -> dict[str, StoredTensor]:
    """Where each of our tensors lies, under the names of a run's state. Raises: DamagedError, ConfigError,
    ValueError.
    """
    kinds, file_of = tensors_of(directory)
    on_disk, shapes = places(model), our_shapes(model)
    refuse_misfits(kinds, {name: place.shape for name, place in on_disk.items()})
    pieces: dict[str, list[TensorPiece]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for name, (ours, expert, shape) in on_disk.items():
        offsets, sizes = ((), ()) if expert is None else ((expert,), (1,))
        box = {"offsets": (*offsets, *[0] * len(shape)), "sizes": (*sizes, *shape)}
        pieces.setdefault(ours, []).append(TensorPiece(file=file_of[name], key=name, **box))
        dtypes[ours] = kinds[name].dtype
    index = {
        f"model.{ours}": StoredTensor(dtype=dtypes[ours], shape=shapes[ours], pieces=tuple(parts))
        for ours, parts in pieces.items()
    }
    refuse_uncovered(index, where=directory)
    return index


def tensors_of(directory: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """{name: kind} and {name: file} of all tensors in the files of a directory. Raises: DamagedError,
    ConfigError.
    """
    listed = weight_map(directory)
    files = sorted(set(listed.values())) if listed is not None else [SINGLE]
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise DamagedError(f"{directory}: {', '.join(missing)} missing; fetch it again")
    headers = {file: read_header(directory / file) for file in files}
    held = {(name, file) for file, header in headers.items() for name in header}
    if listed is not None and (wrong := sorted(held ^ set(listed.items()))):
        differences = ", ".join(f"{name} in {file}" for name, file in wrong[:8])
        raise DamagedError(f"{directory / SEVERAL} and the files do not agree on {differences}")
    return {name: headers[file][name] for name, file in held}, dict(held)


def weight_map(directory: Path) -> dict[str, str] | None:
    """{tensor: file}, checked to stay in the directory; None: there is one file. Raises: DamagedError,
    ConfigError.
    """
    path = directory / SEVERAL
    if not path.is_file():
        if not (directory / SINGLE).is_file():
            pickled = sorted(file.name for file in directory.glob("*.bin"))
            why = (
                f"only {pickled[0]}, a pickle, which is not read; save it as safetensors"
                if pickled
                else "no safetensors"
            )
            raise ConfigError(f"{directory} has {why}: it needs {SINGLE} or {SEVERAL}")
        return None
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise DamagedError(f"{path}: it has no weight_map of files")
    try:
        return {name: plain_name(file) for name, file in files.items()}
    except ValueError as error:
        raise DamagedError(f"{path}: {error}") from error


def sizes(directory: Path, index: Mapping[str, StoredTensor]) -> dict[str, int]:
    """{file: bytes, -1 if it is not there}: are they the same on all hosts?"""
    paths = {
        file: directory / file
        for file in sorted({piece.file for stored in index.values() for piece in stored.pieces})
    }
    return {f"bytes of {file}": path.stat().st_size if path.is_file() else -1 for file, path in paths.items()}
