"""Is what we export our model to transformers, and is what we import the model that was exported, bit for
bit?

Expected tensors come by another way: the checkpoint read whole (read_whole), renamed by to_hf. Expected
behaviour comes from transformers' own classes and from safetensors' own reader. The run that is exported was
trained on 4 ranks, HSDP x EP.
"""

import argparse
import errno
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import AfmoeForCausalLM, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import (
    BoxReader,
    Checkpoints,
    DamagedError,
    StoredTensor,
    TensorPiece,
    TensorSpec,
    boxes,
    read_header,
    read_manifest,
    read_whole,
    write_file,
)
from trainer.checkpoint.manifest import file_entry, write_manifest
from trainer.config import CONFIG_DIR, ConfigError, ModelConfig, load, resolved_yaml
from trainer.data import roles
from trainer.model.afmoe import afmoe_config
from trainer.model.hf import config_misfits, to_hf
from trainer.ranks import device
from trainer.weights import pretrained, tensors, texts, verify
from trainer.weights.export import DAMAGED, OK, REFUSED, main

BASE = ["model=debug", "seq_len=32", "global_batch=4", "micro_batch=1", "data=txt", "data.workers=0"]
UP, BIAS = "model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.2.mlp.expert_bias"


def train_worker(overrides: list[str]) -> int:
    return train.train(load([*BASE, *overrides]))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A corpus, and runs/text: trained on 4 ranks, with checkpoints of steps 2 and 3."""
    root = tmp_path_factory.mktemp("export")
    (root / "corpus").mkdir()
    for module in (argparse, inspect, typing):
        (root / "corpus" / f"{module.__name__}.txt").write_text(inspect.getsource(module))
    spans = ["stage=constant", "stage.run.steps=3", "+stage.longer={steps: 5, seq_len: 64}", "steps=null"]
    made = [
        "name=text",
        *where(root),
        "parallel=hsdp_ep",
        "optim=muon",
        "balance=smebu_fast",
        "checkpoint.interval=1",
        *spans,
        "steps=3",
    ]
    run_ranks(train_worker, 4, made)
    return root


def where(root: Path) -> list[str]:
    return [f"run_dir={root}/runs", f"data.source.path={root}/corpus", f"data.cache_dir={root}/cache"]


@pytest.fixture(scope="module")
def exported(root) -> Path:
    assert main([str(root / "runs/text"), str(root / "float32")]) == OK
    return root / "float32"


def checkpoint_of(root: Path, step: int = 3) -> Path:
    return root / "runs" / "text" / "checkpoints" / f"step-{step:08d}"


def expected(checkpoint: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What the exported files must hold: all of the checkpoint's model, read at once and renamed."""
    state = {name[6:]: tensor for name, tensor in read_whole(checkpoint).items() if name.startswith("model.")}
    renamed = to_hf(state, load(["model=debug", *BASE[1:], "name=x", "steps=1", "data.source.path=x"]).model)
    return {
        name: tensor if name.endswith("expert_bias") else tensor.to(dtype) for name, tensor in renamed.items()
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


# -- what is written
# -------------------------------------------------------------------------------------------


def test_one_file_holds_the_checkpoint_bit_for_bit(root, exported):
    held = load_file(exported / "model.safetensors")
    assert equal(held, expected(checkpoint_of(root)))
    assert held[BIAS].any()  # the run has moved the biases: that they are there is not vacuous
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in exported.iterdir()) == names
    assert not (root / "float32.draft").exists()


def test_shards_and_their_index_in_bfloat16(root, tmp_path):
    """Layout by hand: each file at most the limit, each tensor in one file, biases in float32, all starts
    aligned.
    """
    out = tmp_path / "out"
    assert main([str(checkpoint_of(root, 2)), str(out), "--dtype=bfloat16", "--shard-gb=0.0002"]) == OK
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3 and files == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    held = {}
    for file in files:
        with safe_open(out / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            in_file = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        assert sum(tensor.nbytes for tensor in in_file.values()) <= 200_000
        assert {index["weight_map"][name] for name in in_file} == {file}
        header_bytes = int.from_bytes((out / file).read_bytes()[:8], "little")
        header = json.loads((out / file).read_bytes()[8 : 8 + header_bytes])
        assert header_bytes % 8 == 0
        assert all(header[name]["data_offsets"][0] % in_file[name].element_size() == 0 for name in in_file)
        held |= in_file
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert index["weight_map"].keys() == held.keys()
    assert equal(held, expected(checkpoint_of(root, 2), torch.bfloat16))


def test_config_and_tokenizer_are_the_runs(root, exported):
    """The longest row that it was trained on is 32: the span of 64 was not reached."""
    config = AutoConfig.from_pretrained(exported)
    assert (config.model_type, config.dtype, config.eos_token_id) == ("afmoe", torch.float32, 0)
    assert (
        config.rope_parameters == {"rope_type": "default", "rope_theta": 10_000.0}
        and config.max_position_embeddings == 32
    )
    tokenizer = AutoTokenizer.from_pretrained(exported)
    own = texts.tokenizer_of(checkpoint_of(root), load([*BASE, *where(root), "name=x", "steps=1"]))
    text = "def f(x):\n    return x  # ünïcode\n"
    assert (
        tokenizer(text)["input_ids"] == own.encode(text).ids
        and tokenizer.decode(own.encode(text).ids) == text
    )
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.bos_token) == ("<|endoftext|>", 0, None)
    assert tokenizer.model_max_length == 32 and GenerationConfig.from_pretrained(exported).eos_token_id == 0


def test_transformers_generates_what_our_model_does(root, exported):
    """Greedy, token by token, 24 of them, past the window; nothing of the files is unused or made up."""
    theirs, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert type(theirs) is AfmoeForCausalLM and not any(told.values())
    config = load([*BASE, *where(root), "name=x", "steps=1"])
    ours = verify.our_model(checkpoint_of(root), config, dtype=torch.float32)
    tokens_BL = verify.text_tokens(config, texts.tokenizer_of(checkpoint_of(root), config))[:, :20]
    out_BL = theirs.generate(tokens_BL, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out_BL.shape == (2, 44)
    for length in range(20, 44):
        assert torch.equal(ours(out_BL[:, :length])[:, -1].argmax(dim=-1), out_BL[:, length])


@pytest.mark.parametrize("name", ["nano", "mini", "large"])
def test_the_plan_of_the_published_sizes(name, tmp_path):
    """Names and shapes are those of save_pretrained for our config.json; 5 GB files, as many as bytes ask
    for.
    """
    model = ModelConfig(**OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml"))
    config = replace(load(["experiment=demo"]), model=model)
    texts.write_texts(
        tmp_path, checkpoint=tmp_path, config=config, dtype="bfloat16", tokens=1, tokenizer=None
    )
    with torch.device("meta"):
        hf = AfmoeForCausalLM(AutoConfig.from_pretrained(tmp_path))
        theirs = revert_weight_conversion(hf, hf.state_dict())
    shards = tensors.plan(model, dtype=torch.bfloat16, shard_bytes=5e9)
    planned = [(name, kind) for shard in shards for name, kind in shard.kinds.items()]
    assert {name: kind.shape for name, kind in planned} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }
    assert len(planned) == len(theirs)
    assert all(
        kind.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16)
        for name, kind in planned
    )
    num_bytes = sum(
        tensor.numel() * (4 if name.endswith("expert_bias") else 2) for name, tensor in theirs.items()
    )
    assert sum(shard.num_bytes for shard in shards) == num_bytes
    assert max(shard.num_bytes for shard in shards) <= 5e9
    assert num_bytes / 5e9 <= len(shards) <= num_bytes / 4.9e9 + 1


PEAK = """
import sys
from torch.utils._python_dispatch import TorchDispatchMode
import trainer.weights.export as program

def held_mb():  # private memory that no file backs; pages of mapped files are the kernel's to drop
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1e3

held = []
class Measured(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        made = op(*args, **(kwargs or {}))
        held.append(held_mb())  # after each operation, while all that it used is still there
        return made

write = program.write_weights
def measured(*arguments):
    with Measured():
        before = held_mb()
        write(*arguments)
    print("GROWN", max(held) - before)
program.write_weights = measured
sys.exit(program.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_memory_is_one_tensor_whatever_the_stacks_are(tmp_path):
    """A stack of 16 experts has 67 MB, one expert 4.2 MB, a shard 20 MB. The export grows by less than four
    experts.
    """
    shape = [
        "model.num_layers=1",
        "model.num_dense_layers=0",
        "model.num_experts=16",
        "model.expert_dim=512",
        "model.dim=2048",
        "model.vocab_size=64",
        "model.num_heads=1",
        "model.num_kv_heads=1",
        "model.num_shared_experts=1",
    ]

    def save():
        config = load([*BASE, *shape, "name=wide", "steps=1", f"run_dir={tmp_path}", "data.source.path=x"])
        with torch.device("meta"):
            state = afmoe_config(config.model, flex=False).build().state_dict()
        state = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
        own = {"config.yaml": resolved_yaml(config)}
        Checkpoints(tmp_path / "wide" / "checkpoints").save(1, {"model": state}, texts=own, wait=True)

    run_ranks(save, 1)
    command = [
        sys.executable,
        "-c",
        PEAK,
        str(tmp_path / "wide"),
        str(tmp_path / "out"),
        "--dtype=bfloat16",
        "--shard-gb=0.02",
    ]
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=os.environ | at_once
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6  # 101 MB in bfloat16
    assert float(done.stdout.split("GROWN")[1].splitlines()[0]) < 16


# -- checked against transformers
# ------------------------------------------------------------------------------


def test_verify_compares_and_prompt_continues(root, tmp_path, capsys):
    arguments = [
        str(root / "runs/text"),
        "2",
        "--verify",
        "--dtype=bfloat16",
        str(tmp_path / "out"),
        "--prompt",
        "import os",
    ]
    assert main(arguments) == OK
    told = capsys.readouterr().out
    assert "verified: logits of 2 x 32 tokens" in told and "16 greedy tokens are the same" in told
    assert "step 2 of text, 177 tensors in bfloat16" in told and "'import os':\nimport os" in told
    # from nothing: as after the end of a document
    assert verify.continuation(tmp_path / "out", "", max_new_tokens=3)
    assert (
        len(
            AutoTokenizer.from_pretrained(tmp_path / "out")(told.split("'import os':\n")[1].rstrip("\n"))[
                "input_ids"
            ]
        )
        > 10
    )


def swapped_experts(monkeypatch):
    read = tensors.Weights.read
    other = {UP: UP.replace("experts.2", "experts.3")}
    monkeypatch.setattr(
        tensors.Weights, "read", lambda self, name, dtype: read(self, other.get(name, name), dtype)
    )


def truncated_rounding(monkeypatch):
    def read(self, name, dtype):
        tensor = READ(self, name, torch.float32)
        if dtype == torch.bfloat16:
            tensor = (tensor.view(torch.int32) & -65536).view(torch.float32).to(dtype)
        return tensor

    monkeypatch.setattr(tensors.Weights, "read", read)


def another_angle(monkeypatch):
    monkeypatch.setattr(
        texts,
        "hf_config",
        lambda *a, **k: (
            HF_CONFIG(*a, **k) | {"rope_parameters": {"rope_type": "default", "rope_theta": 9_000.0}}
        ),
    )


READ, HF_CONFIG = tensors.Weights.read, texts.hf_config


@pytest.mark.parametrize("damage", [swapped_experts, truncated_rounding, another_angle])
def test_verify_finds_small_errors_and_leaves_nothing(root, tmp_path, capsys, monkeypatch, damage):
    damage(monkeypatch)
    assert main([str(root / "runs/text"), str(tmp_path / "out"), "--verify", "--dtype=bfloat16"]) == DAMAGED
    assert "are not those of" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_differ_fail_the_verification(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "greedy", lambda model, tokens_BL: [[1] * 16, [2] * 16])
    assert main([str(root / "runs/text"), str(tmp_path / "out"), "--verify"]) == DAMAGED
    assert (
        "16 tokens after each row's first 16 do" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    )


def test_without_transformers_it_is_named(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    assert main([str(root / "runs/text"), str(tmp_path / "out"), "--verify"]) == REFUSED
    assert "pip install 'triquetra[chat]'" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert main([str(root / "runs/text"), str(tmp_path / "out")]) == OK


# -- what is refused
# -------------------------------------------------------------------------------------------


@pytest.fixture
def run_copy(root, tmp_path) -> Path:
    """runs/text, to be damaged."""
    return Path(shutil.copytree(root / "runs/text", tmp_path / "text"))


def change_index(checkpoint: Path, change) -> None:
    """Rewrites index.json, and the manifest, so that the checkpoint verifies."""
    path = checkpoint / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files") | {"index.json": file_entry(path)}
    write_manifest(checkpoint, manifest, files)


OURS = "model.layers.1.moe.routed_experts.inner_experts.w3_EFD"
CHANGES = {
    "w3_EFD@0,0,0, which index.json does not name": lambda index: index.pop(OURS),
    "hold 16384 of the 16640 values": lambda index: index[OURS].update(shape=[8, 32, 65]),
    "w3_EFD_more@0,0,0 must be": lambda index: index.update({f"{OURS}_more": index[OURS]}),
    "must be ('BF16', (8,))": lambda index: index["model.layers.2.moe.expert_bias_E"].update(
        dtype="bfloat16"
    ),
    "of the 16384 values": lambda index: index[OURS]["pieces"].pop(),
}


@pytest.mark.parametrize("message", CHANGES)
def test_tensors_that_do_not_fit_are_named_and_nothing_stays(run_copy, tmp_path, capsys, message):
    change_index(run_copy / "checkpoints/step-00000003", CHANGES[message])
    assert main([str(run_copy), str(tmp_path / "out")]) == DAMAGED
    error = capsys.readouterr().err
    assert message in error and ("w3_EFD" in error or "expert_bias_E" in error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_a_damaged_checkpoint_is_refused_and_an_older_one_named(run_copy, tmp_path, capsys):
    with (run_copy / "checkpoints/step-00000003/rank-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert main([str(run_copy), str(tmp_path / "out")]) == DAMAGED
    error = capsys.readouterr().err
    assert (
        "rank-00001.safetensors was changed" in error
        and "the checkpoint of step 2 is good: give that step" in error
    )
    assert not (tmp_path / "out").exists()
    assert main([str(run_copy), "2", str(tmp_path / "out")]) == OK
    (run_copy / "checkpoints/step-00000002/index.json").unlink()
    assert main([str(run_copy), str(tmp_path / "other")]) == DAMAGED
    assert "no older checkpoint is good" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "7", "{new}"], "step 7: .*text has steps 2, 3"),
        (["{run}/checkpoints/step-00000003", "3", "{new}"], "is one checkpoint; leave the step out"),
        (["{run}/checkpoints/step-00000009", "{new}"], "there is no such checkpoint"),
        (["{root}", "{new}"], "no run's directory"),
        (["{run}", "{root}"], "is there already; give another name"),
        (
            ["{run}", "{new}", "--dtype=bfloat16", "--prompt=x"],
            "has no tokenizer, its run's source gave tokens",
        ),
        (["{run}", "{foreign}"], "foreign.draft is where an export begins, but it holds thesis.txt"),
    ],
)
def test_what_cannot_be_exported_is_refused(root, tmp_path, capsys, monkeypatch, arguments, message):
    if "gave tokens" in message:
        monkeypatch.setattr("trainer.weights.export.tokenizer_of", lambda *_: None)
    (tmp_path / "foreign.draft").mkdir()
    (tmp_path / "foreign.draft" / "thesis.txt").touch()
    paths = {
        "run": root / "runs/text",
        "new": tmp_path / "new",
        "root": root,
        "foreign": tmp_path / "foreign",
    }
    assert main([argument.format(**paths) for argument in arguments]) == REFUSED
    assert re.search(message, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign.draft"]


def test_a_full_disk_leaves_nothing_and_the_next_export_succeeds(root, tmp_path, capsys, monkeypatch):
    """The disk is full when the second file is made durable. What a killed export left is no obstacle."""
    (tmp_path / "out.draft").mkdir()
    (tmp_path / "out.draft" / "model-00001-of-00009.safetensors").write_text("half")
    calls, fsync = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(boxes.os, "fsync", full)
        assert main([str(root / "runs/text"), str(tmp_path / "out"), "--shard-gb=0.0005"]) == REFUSED
    assert "No space left on device" in capsys.readouterr().err and list(tmp_path.iterdir()) == []
    assert main([str(root / "runs/text"), str(tmp_path / "out"), "--shard-gb=0.0005"]) == OK


def test_boxes_across_pieces(tmp_path):
    """A (4, 6) matrix cut into four pieces, one of them without its leading 1; every box of it, and a gap."""
    whole = torch.arange(24.0).view(4, 6)
    cuts = {"a": ((0, 0), (1, 6)), "b": ((1, 0), (3, 2)), "c": ((1, 2), (2, 4)), "d": ((3, 2), (1, 4))}
    part = {key: whole[i : i + n, j : j + m].contiguous() for key, ((i, j), (n, m)) in cuts.items()}
    save_file({**part, "a": part["a"].view(6)}, tmp_path / "x.safetensors")
    pieces = tuple(
        TensorPiece(file="x.safetensors", key=key, offsets=at, sizes=size) for key, (at, size) in cuts.items()
    )
    reader = BoxReader(tmp_path, {"w": StoredTensor(dtype=torch.float32, shape=(4, 6), pieces=pieces)})
    for i, j, n, m in [(0, 0, 4, 6), (0, 1, 2, 3), (2, 1, 2, 4), (1, 2, 1, 1), (3, 5, 1, 1), (0, 0, 1, 6)]:
        assert torch.equal(reader.read("w", offsets=(i, j), sizes=(n, m)), whole[i : i + n, j : j + m])
    gap = BoxReader(tmp_path, {"w": StoredTensor(dtype=torch.float32, shape=(4, 6), pieces=pieces[:3])})
    with pytest.raises(DamagedError, match="hold 8 of the 12 values"):
        gap.read("w", offsets=(2, 0), sizes=(2, 6))


def test_a_file_of_mixed_dtypes_lies_aligned_and_refuses_another_kind(tmp_path):
    """An odd number of bfloat16 values before a float32 tensor, in the order that is given."""
    tensors = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.arange(2.0),
        "c": torch.zeros(1, 1, dtype=torch.float16),
    }
    kinds = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_file(tmp_path / "x.safetensors", kinds, tensors.__getitem__)
    assert (
        equal(load_file(tmp_path / "x.safetensors"), tensors)
        and read_header(tmp_path / "x.safetensors") == kinds
    )
    size = int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8 : 8 + size])
    assert [header[name]["data_offsets"] for name in "bac"] == [[0, 8], [8, 14], [14, 16]]
    with pytest.raises(ValueError, match="b: is torch.float32 .2,., must be torch.float32 .3,."):
        write_file(
            tmp_path / "y.safetensors", kinds | {"b": TensorSpec(torch.float32, (3,))}, tensors.__getitem__
        )


# -- init_from
# -------------------------------------------------------------------------------------------------


def start(root: Path, directory: Path | str, *more: str) -> list[str]:
    """A run that begins with these weights, and a step that changes nothing of them."""
    still = ["optim.lr=0", "balance=none"]
    return [
        "steps=1",
        *where(root),
        f"init_from={directory}",
        f"data.tokenizer={root}/float32",
        *still,
        *more,
    ]


@pytest.mark.parametrize(
    ("num_ranks", "layout", "dtype"),
    [
        (1, ["name=one"], "float32"),
        pytest.param(4, ["name=four", "parallel=hsdp_ep"], "float32", marks=pytest.mark.slow),
        (1, ["name=rounded"], "bfloat16"),
    ],
)
def test_round_trip_is_bit_equal(root, exported, tmp_path, num_ranks, layout, dtype):
    """export -> init_from -> a checkpoint -> export: the same files, and in float32 the tensors that the
    first run had.
    """
    options = [f"--dtype={dtype}", "--shard-gb=0.0005"]
    assert main([str(root / "runs/text"), str(tmp_path / "first"), *options]) == OK
    run_ranks(train_worker, num_ranks, start(root, tmp_path / "first", f"run_dir={tmp_path}", *layout))
    name = layout[0].removeprefix("name=")
    assert main([str(tmp_path / name), str(tmp_path / "second"), *options]) == OK
    files = sorted(path.name for path in (tmp_path / "first").glob("model*"))
    assert len(files) >= 3
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    if dtype == "float32":
        first, second = (
            read_whole(checkpoint_of(root)),
            read_whole(tmp_path / name / "checkpoints/step-00000001"),
        )
        own = [key for key in first if key.startswith("model.")]
        assert equal({key: first[key] for key in own}, {key: second[key] for key in own})
    line = json.loads((tmp_path / name / "starts.jsonl").read_text())
    assert (line["step"], line["loaded"], line["init_from"]) == (0, None, str(tmp_path / "first"))


def test_a_run_with_a_checkpoint_of_its_own_does_not_look_there(root, exported, tmp_path, capfd):
    gone = shutil.copytree(exported, tmp_path / "gone")
    run = start(root, gone, "name=again", f"run_dir={tmp_path}", "stage=constant")
    run_ranks(train_worker, 1, run)
    assert f"starting from the weights of {gone}" in capfd.readouterr().out
    shutil.rmtree(gone)
    run_ranks(train_worker, 1, [*run, "steps=2"])
    assert "continuing at step 1 of 2" in capfd.readouterr().out
    starts = [json.loads(line) for line in (tmp_path / "again" / "starts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["init_from"]) for line in starts] == [(0, str(gone)), (1, None)]


def test_the_hub_is_asked_once_per_host_and_its_cache_read(root, exported, tmp_path, capfd):
    """A cache as the hub's client makes it, with links to blobs; without network it is all there is."""
    snapshot = tmp_path / "hub/models--someone--weights/snapshots/0123abcd"
    (tmp_path / "hub/models--someone--weights/refs").mkdir(parents=True)
    (tmp_path / "hub/models--someone--weights/refs/main").write_text("0123abcd")
    snapshot.mkdir(parents=True)
    for path in exported.iterdir():
        (snapshot / path.name).symlink_to(path)
    run = start(root, "someone/weights", "name=hub", f"run_dir={tmp_path}", "parallel=fsdp")

    def worker():
        import huggingface_hub

        huggingface_hub.constants.HF_HUB_CACHE = str(tmp_path / "hub")
        return train_worker(run)

    run_ranks(worker, 2)
    assert "starting from the weights of someone/weights" in capfd.readouterr().out
    first, second = run_ranks(
        refusal, 2, start(root, "some/other", "name=no", f"run_dir={tmp_path}", "parallel=fsdp")
    )
    assert re.match(
        "init_from=some/other: no such directory, and the hub does not give it .*HF_HUB_OFFLINE", first
    )
    assert second == first


def refusal(overrides: list[str]) -> str | None:
    """What a rank is told; the hub fails on the first rank only, the others would find something in their
    cache.
    """
    import huggingface_hub

    if torch.distributed.get_rank():
        huggingface_hub.snapshot_download = lambda *args, **kwargs: "/tmp"
    try:
        train_worker(overrides)
    except ConfigError as error:
        return str(error)


@pytest.fixture
def alone():
    """A process group of this process."""
    device.start(timeout_s=600)
    yield
    torch.distributed.destroy_process_group()


def without(directory: Path, name: str) -> None:
    held = load_file(directory / "model.safetensors")
    save_file({key: tensor for key, tensor in held.items() if key != name}, directory / "model.safetensors")


def added(directory: Path, more: dict[str, torch.Tensor]) -> None:
    save_file(load_file(directory / "model.safetensors") | more, directory / "model.safetensors")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def cut(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", (directory / "model.safetensors").stat().st_size - 1)


def mapped(directory: Path, file: str, **more: str) -> None:
    said = dict.fromkeys(load_file(directory / "model.safetensors"), file) | more
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": said}))


WRONG = {
    r"model_type=llama, must be afmoe": lambda d: edit(d / "config.json", model_type="llama"),
    (
        r"(?s)model.dim=64, but hidden_size=128.*model.window=32, but sliding_window=16.*use model.dim=128 "
        r"model.window=16"
    ): lambda d: edit(d / "config.json", hidden_size=128, sliding_window=16),
    r"rope_type=yarn, but an AFMoE here has default": lambda d: edit(
        d / "config.json", rope_scaling={"type": "yarn"}
    ),
    r"mup_enabled=False, but": lambda d: edit(d / "config.json", mup_enabled=False),
    r"model.global_every=4, but .* by layer_types": lambda d: edit(
        d / "config.json", layer_types=["full_attention"] * 5
    ),
    r"config.json is missing": lambda d: (d / "config.json").unlink(),
    r"config.json: Expecting": lambda d: (d / "config.json").write_text("{"),
    rf"1 tensors do not fit the model:\n{UP}: missing, must be \(32, 64\)": lambda d: without(d, UP),
    r"model.extra: unknown, has \(3,\)": lambda d: added(d, {"model.extra": torch.zeros(3)}),
    rf"{UP}: has \(64, 32\), must be \(32, 64\)": lambda d: added(d, {UP: torch.zeros(64, 32)}),
    rf"model.safetensors: {UP} is I8; weights must be one of F32": lambda d: added(
        d, {UP: torch.zeros(32, 64).char()}
    ),
    r"has only pytorch_model.bin, a pickle, which is not read": pickled,
    r"model.safetensors: cannot be read as safetensors": cut,
    r"'../model.safetensors' must be a plain file name": lambda d: mapped(d, "../model.safetensors"),
    r"'/etc/passwd' must be a plain file name": lambda d: mapped(
        d, "model.safetensors", **{UP: "/etc/passwd"}
    ),
    r"model-2.safetensors missing": lambda d: mapped(d, "model.safetensors", **{UP: "model-2.safetensors"}),
    r"do not agree on more in model.safetensors": lambda d: mapped(
        d, "model.safetensors", more="model.safetensors"
    ),
    r"it has no weight_map": lambda d: (d / "model.safetensors.index.json").write_text("{}"),
    r"the run's tokenizer is not that of the weights; use data.tokenizer=.*tokenizer.json": lambda d: edit(
        d / "tokenizer.json", normalizer={"type": "NFC"}
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_directory_that_does_not_fit_is_refused(root, exported, tmp_path, alone, message):
    """Before anything is loaded: there is no model here that could be filled."""
    directory = Path(shutil.copytree(exported, tmp_path / "weights"))
    WRONG[message](directory)
    config = load([*BASE, *start(root, directory, "name=x")])
    tokenizer = texts.tokenizer_of(checkpoint_of(root), config)
    with pytest.raises(ConfigError, match=message) as error:
        pretrained.start_from(config, None, tokenizer)
    assert str(error.value).startswith(f"init_from={directory}: ")


@pytest.mark.parametrize(
    ("directory", "message"),
    [
        ("{0}/runs/text", "is a run's; use branch="),
        ("{0}/runs/text/checkpoints/step-00000003", "is a run's; use branch="),
        ("{0}/nowhere", "must be a directory with model.safetensors, or a hub name"),
        ("{0}/corpus/typing.txt", "must be a direc"),
    ],
)
def test_a_path_that_is_none_is_refused(root, alone, directory, message):
    config = load([*BASE, *start(root, directory.format(root), "name=x")])
    with pytest.raises(ConfigError, match=message):
        pretrained.start_from(config, None, None)


def test_contradictions_are_refused_before_anything_is_built(root, exported, monkeypatch):
    monkeypatch.setattr(train, "build", lambda config: pytest.fail("it was built"))
    with pytest.raises(
        ConfigError,
        match=f"data.tokenizer=train, but init_from=.* use data.tokenizer={exported}/tokenizer.json",
    ):
        train.train(load([*BASE, *start(root, exported, "name=x", "data.tokenizer=train")]))
    with pytest.raises(ConfigError, match="init_from=a/b and branch=c are both set"):
        load([*BASE, *start(root, "a/b", "name=x", "branch=c")])


def test_all_ranks_refuse(root, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "weights")
    cut(directory)
    first, second = run_ranks(
        refusal, 2, start(root, directory, "name=x", f"run_dir={tmp_path}", "parallel=fsdp")
    )
    assert first == second and "cannot be read as safetensors" in first


def test_the_published_configuration_is_our_nano():
    """The values of arcee-ai/Trinity-Nano-Preview's config.json, as it was published with transformers
    4.57.
    """
    published = {
        "architectures": ["AfmoeForCausalLM"],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "global_attn_every_n_layers": 4,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "initializer_range": 0.02,
        "intermediate_size": 3072,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 14,
        "max_position_embeddings": 131072,
        "model_type": "afmoe",
        "moe_intermediate_size": 256,
        "mup_enabled": True,
        "n_group": 1,
        "num_attention_heads": 8,
        "num_dense_layers": 2,
        "num_expert_groups": 1,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 56,
        "num_key_value_heads": 2,
        "num_limited_groups": 1,
        "num_shared_experts": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000,
        "route_norm": True,
        "route_scale": 2.826,
        "score_func": "sigmoid",
        "sliding_window": 2048,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_cache": True,
        "use_grouped_mm": True,
        "vocab_size": 200192,
    }
    nano = ModelConfig(**OmegaConf.load(CONFIG_DIR / "model" / "nano.yaml"))
    assert config_misfits(published, nano) == []
    assert config_misfits(published | {"rope_theta": 5e5, "n_group": 2}, nano) == [
        "model.rope_theta=10000.0, but rope_theta=500000.0",
        "n_group=2, but an AFMoE here has 1",
    ]
    del published["sliding_window"], published["mup_enabled"]
    assert config_misfits(published, nano) == [
        "model.window=2048, but sliding_window=<not there>",
        "mup_enabled=<not there>, but an AFMoE here has True",
    ]


def test_special_tokens_by_their_names():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_tokens([AddedToken("<pad>", special=False)])  # a word that looks like one
    tokenizer.add_special_tokens(["<s>", "</s>"])
    assert roles(tokenizer) == {"eos": ("</s>", 2), "bos": ("<s>", 1)}


# -- turns
# -----------------------------------------------------------------------------------------------------


TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_turns(root: Path, directory: Path) -> tuple[Path, Tokenizer]:
    """The checkpoint of step 3, with a chat template and with its marks in the tokenizer's last places."""
    checkpoint = Path(
        shutil.copytree(checkpoint_of(root), directory / "run" / "checkpoints" / "step-00000003")
    )
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    dropped = {" ".join(merge) for merge in map(list, content["model"]["merges"][-2:])}
    content["model"]["merges"] = content["model"]["merges"][:-2]
    for merge in dropped:
        del content["model"]["vocab"][merge.replace(" ", "")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (checkpoint / "tokenizer.json").write_text(tokenizer.to_str())
    (checkpoint / "chat_template.jinja").write_text(TURNS)
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files")
    changed = {name: file_entry(checkpoint / name) for name in ("tokenizer.json", "chat_template.jinja")}
    write_manifest(checkpoint, manifest, files | changed)
    return checkpoint, tokenizer


def test_the_chat_template_and_what_ends_a_turn_are_in_the_export(root, tmp_path):
    """transformers renders the run's template, and its generate stops at the end of a turn and of a text.
    What pads is not called so in config.json, where transformers would never train its row."""
    checkpoint, tokenizer = with_turns(root, tmp_path)
    assert main([str(checkpoint), str(tmp_path / "out")]) == OK
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "argv"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    start, end = (tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    plain = [tokenizer.encode(text).ids for text in ("user\nargv", "\n", "assistant\n")]
    assert ids == [start, *plain[0], end, *plain[1], start, *plain[2]]
    assert (theirs.eos_token, theirs.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.eos_token_id, generation.pad_token_id) == ([end, 0], 0)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.eos_token_id, config.pad_token_id) == (end, None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().padding_idx is None


def test_what_only_pads_is_called_so():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<|im_end|>"])
    assert texts.model_ids(texts.endings(tokenizer, None)) == {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    # a token that the template does not write ends nothing
    assert texts.endings(tokenizer, "{{ '<|end|>' }}")["eos"] == [("</s>", 1)]
    assert texts.endings(tokenizer, "{{ '<|im_end|>' }}")["eos"] == [("<|im_end|>", 3), ("</s>", 1)]
