"""Whatever lies in a checkpoint: is it loaded as it was written, or refused in one line?

    python -m tests.fuzz.files [CASES] [SEED] [FIRST]

A case changes one file of the newer of two checkpoints (made once, on two ranks): bytes, JSON, YAML, a
header, or what kind of thing lies there; mostly the manifest is made to fit. Then `verify` and `list` judge
it, and one of resume, export and rewind uses it, in a forked child. Each ends with a documented code, with
one line `error: ...` where that code says so, without a traceback, and as `verify` judged. What a resume
loads is, byte for byte, what an independent reader finds in the shards. CASES: 200 · SEED: 0 · FIRST: 0; case
n of a seed is the same whatever the others are.
"""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tests.fuzz import cases_of, until_told
from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import Checkpoints, read_whole
from trainer.checkpoint.__main__ import main as checkpoint
from trainer.checkpoint.manifest import file_entry, write_manifest
from trainer.config import Config, load
from trainer.ranks import device
from trainer.weights.export import main as export

RUN = [
    *("model=debug", "model.num_layers=2", "model.global_every=2", "model.dim=16", "model.ffn_dim=16"),
    *("model.expert_dim=16", "model.num_experts=4", "model.vocab_size=264", "seq_len=16", "global_batch=2"),
    *("micro_batch=1", "data=txt", "data.tokenizer=train", "data.workers=0", "data.retry_s=0"),
    *("name=run", "checkpoint.interval=1", "checkpoint.keep=9", "checkpoint.retries=0", "balance=smebu"),
]
OLDER, NEWER = "step-00000001", "step-00000002"
CPU_S, WALL_S = 60, 240  # [s] of a case: against a hang, on a machine that is busy with other work
NUMPY = {
    "F32": np.float32,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NUMPY |= {"F64": np.float64, "I8": np.int8, "F16": np.float16, "BF16": np.uint16}

NUMBERS = [-1, 0, 1, 2, 3, 16, 17, 2**31, 2**53 + 1, 2**63, 2**64, 10**13, 10**40, 0.5, -0.0, 1e308]
TEXTS = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../latest",
    "a/b",
    "a\0b",
    "\ud800",
    "Ω",
    "x" * 5000,
    "a\nb",
    "\x1b[31m",
]
TEXTS += ["[/b]", "${oc.env:HOME}", "???", "rank-00001.safetensors", "float64", "F64", "null", "%s{}"]
OTHERS = [None, True, [], {}, [[]], [0], [-1, 0], {"a": {"a": []}}, "".join(["["] * 10)]
LINES = [
    "a: !!python/object/apply:os.system [true]",
    "a: &a [1]",
    "b: *a",
    "a: ${seed}",
    "- 1",
    "\t",
    "{",
    "? a",
]
LINES += [
    "a: " + "[" * 500,
    "seed: 1",
    "seed: {a: 1}",
    "1: 2",
    "a: 1e999",
    "!!set {a}",
    "<<: {a: 1}",
    "---",
    "%",
]


# -- one case: what is changed ------------------------------------------------------------------------------


def changed(of: random.Random, run: Path) -> str:
    """Changes something in the newer checkpoint. Returns what, in words."""
    path = run / "checkpoints" / NEWER
    file = path / of.choice(sorted(os.listdir(path)))
    changes = [any_bytes, other_thing]
    changes += [json_edit] * 3 if file.suffix == ".json" else []
    changes += [yaml_edit] * 2 if file.suffix == ".yaml" else []
    changes += [header_edit] * 3 + [header_length] if file.suffix == ".safetensors" else []
    what = of.choice(changes)(of, file)
    if file.name != "manifest.json" and of.random() < 0.9:
        fit(path)
        what += ", the manifest fits"
    return f"{file.name}: {what}"


def fit(path: Path) -> None:
    about = json.loads((path / "manifest.json").read_text())
    del about["xxh3"]
    files = about.pop("files")
    regular = {name for name in files if (path / name).is_file() and not (path / name).is_symlink()}
    write_manifest(path, about, files | {name: file_entry(path / name) for name in regular})


def any_bytes(of: random.Random, file: Path) -> str:
    content = bytearray(file.read_bytes())
    at, width = of.randrange(len(content)), of.choice((1, 1, 4, 64))
    how = of.choice(("flip", "flip", "cut", "empty", "zeros", "insert", "double", "noise"))
    match how:
        case "flip":
            content[at] ^= 1 << of.randrange(8)
        case "cut":
            del content[at:]
        case "empty":
            content.clear()
        case "zeros":
            content[at : at + width] = bytes(len(content[at : at + width]))
        case "insert":
            content[at:at] = of.randbytes(width)
        case "double":
            content[at:at] = content[at : at + width]
        case "noise":
            content[at : at + width] = of.randbytes(len(content[at : at + width]))
    file.write_bytes(content)
    return f"{how} at byte {at}"


def other_thing(of: random.Random, file: Path) -> str:
    how = of.choice(("gone", "link", "hanging link", "endless link", "pipe", "directory", "device", "twin"))
    file.rename(file.with_name("kept"))
    match how:
        case "link":
            file.symlink_to("kept")
        case "hanging link":
            file.symlink_to("nowhere")
        case "endless link":
            file.symlink_to(file.name)
        case "pipe":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "device":
            file.symlink_to("/dev/zero")
        case "twin":
            twins = [path for path in file.parent.iterdir() if path.name != "manifest.json"]
            shutil.copyfile(of.choice(sorted(twins)), file)
    return how


def json_edit(of: random.Random, file: Path) -> str:
    content = json.loads(file.read_text())
    what = edited(of, content)
    if file.name == "manifest.json" and of.random() < 0.9 and isinstance(content.get("files"), dict):
        content.pop("xxh3", None)
        with suppress(TypeError, ValueError):
            write_manifest(file.parent, {k: v for k, v in content.items() if k != "files"}, content["files"])
            return f"{what}, with its hash"
    text = json.dumps(content)
    if of.random() < 0.1:
        text = text.replace("0", of.choice(("NaN", "Infinity", "1" * 5000, '"0"')), 1)
    file.write_text(text)
    return what


def edited(of: random.Random, content: dict) -> str:
    """Changes one value or key anywhere in nested dicts and lists."""
    node: Any = content
    names = []
    while True:
        key = of.choice(list(node)) if isinstance(node, dict) else of.randrange(len(node))
        names.append(str(key)[:40])
        if not (isinstance(node[key], dict | list) and node[key]) or of.random() < 0.15:
            break
        node = node[key]
    value = of.choice(of.choice((NUMBERS, TEXTS, OTHERS)))
    how = of.choice(("value", "value", "value", "near", "gone", "twin", "swap", "key"))
    near = type(node[key]) is int
    if how == "near" and near:
        node[key] += of.choice((-1, 1, 2, -8, 8))
    elif how == "gone":
        del node[key]
    elif how == "twin" and isinstance(node, list):
        node.append(node[key])
    elif how == "twin":
        node[f"{key}2"] = node[key]
    elif how == "swap":
        other = of.choice(list(node)) if isinstance(node, dict) else of.randrange(len(node))
        node[key], node[other] = node[other], node[key]
    elif how == "key" and isinstance(node, dict):
        node[str(value)] = node.pop(key)
    else:
        node[key] = value
    return f"{how} of {'.'.join(names)} ({str(value)[:30]!r})"


def yaml_edit(of: random.Random, file: Path) -> str:
    lines = file.read_text().splitlines()
    at = of.randrange(len(lines))
    how = of.choice(("value", "value", "line", "gone", "twin", "indent"))
    value = str(of.choice(of.choice((NUMBERS, [t for t in TEXTS if t != "\ud800"], LINES))))
    match how:
        case "value":
            lines[at] = f"{lines[at].split(':')[0]}: {value}"
        case "line":
            lines.insert(at, value)
        case "gone":
            del lines[at]
        case "twin":
            lines.insert(at, lines[at])
        case "indent":
            lines[at] = f" {lines[at]}"
    file.write_text("\n".join(lines) + "\n")
    return f"{how} at line {at + 1} ({value[:40]!r})"


def header_edit(of: random.Random, file: Path) -> str:
    size, header, data = parts(file)
    what = edited(of, header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return f"header of {size} bytes: {what}"


def header_length(of: random.Random, file: Path) -> str:
    length = of.choice((0, 1, 2, 8, 100_000_000, 100_000_001, 2**31, 2**63, 2**64 - 1))
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    return f"a header of {length} bytes"


# -- what is in it, read by nobody's code but this ---------------------------------------------------------


def parts(file: Path) -> tuple[int, dict, bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return size, json.loads(content[8 : 8 + size]), content[8 + size :]


def tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, whole, from the keys and shapes in its shards alone."""
    pieces: dict[str, list] = {}
    for file in sorted(path.glob("*.safetensors")):
        _, header, data = parts(file)
        for key, of in header.items():
            if key == "__metadata__":
                continue
            name, at = key.rsplit("@", 1)
            start, end = of["data_offsets"]
            part = np.frombuffer(data[start:end], NUMPY[of["dtype"]]).reshape(of["shape"])
            pieces.setdefault(name, []).append((tuple(map(int, filter(None, at.split(",")))), part))
    whole = {}
    for name, of in pieces.items():
        ends = [[o + n for o, n in zip(at, part.shape, strict=True)] for at, part in of]
        whole[name] = np.zeros([max(axis) for axis in zip(*ends, strict=True)], of[0][1].dtype)
        for at, part in of:
            whole[name][tuple(slice(o, o + n) for o, n in zip(at, part.shape, strict=True))] = part
    return whole


def differing(state: dict[str, Any], expected: dict[str, np.ndarray], prefix: str = "") -> list[str]:
    """Names of the tensors of a nested state whose bytes are not these."""
    names = []
    for key, value in state.items():
        if isinstance(value, dict):
            names += differing(value, expected, f"{prefix}{key}.")
        elif value.detach().numpy().tobytes() != expected[prefix + key].tobytes():
            names.append(prefix + key)
    return names


# -- one case: what becomes of it -------------------------------------------------------------------------


class Outcome(NamedTuple):
    number: int
    what: str
    command: str
    kind: str  # for the table
    problem: str | None
    told: str


def child(run: Path, config: Config, command: str) -> dict[str, Any]:
    """The codes and texts of verify, list and the command."""
    told = {}
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        told["verify"] = checkpoint(["verify", str(run), "2"])
        told["good"] = "step 2: good" in out.getvalue()
        told["list"] = checkpoint(["list", str(run)])
        told["judged"] = out.getvalue() + err.getvalue()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as err:
        match command:
            case "rewind":
                told["code"] = checkpoint(["rewind", str(run), "2"])
            case "export":
                told["code"] = export([str(run), "2", str(run.parent / "out")])
            case "resume":
                told["code"] = resumed(run, config, told)
        told["errors"] = err.getvalue()
    return told


def resumed(run: Path, config: Config, told: dict[str, Any]) -> int:
    """As far as the loop. `told` gets the step that was loaded and what of it is not in the files."""
    original = Checkpoints.load

    def checked(self: Checkpoints, step: int, state: dict[str, Any]) -> dict[str, Any]:
        loaded = original(self, step, state)
        told["loaded"] = step
        told["differing"] = differing(loaded, tensors(self.path(step)))
        return loaded

    def at_the_loop(*of: Any, **named: Any) -> None:
        told["began"] = True
        raise KeyboardInterrupt

    Checkpoints.load, train.loop, train.load = checked, at_the_loop, lambda _: config
    code = train.main([])
    return 0 if told.get("began") else code


def judged(told: dict[str, Any], command: str) -> str | None:
    """What is wrong with an outcome."""
    if "traceback" in told:
        return "traceback"
    errors = [line for line in told["errors"].splitlines() if line.startswith("error:")]
    if told["verify"] != (0 if told["good"] else 1) or told["list"] != 0:
        return f"verify ended with {told['verify']}, list with {told['list']}"
    if "Traceback" in told["errors"] or told["code"] not in (0, 1, 2):
        return f"code {told['code']}"
    if len(errors) != (told["code"] != 0):
        return f"{len(errors)} lines of error with code {told['code']}"
    if command in ("rewind", "export") and not told["good"] and told["code"] != 1:
        return f"verify calls it damaged, {command} ends with {told['code']}"
    if command == "rewind" and told["good"] and told["code"]:
        return "verify calls it good, rewind refuses"
    if told.get("loaded") == 2 and not told["good"]:
        return "verify calls it damaged, resume loads it"
    if told.get("loaded") == 1 and told["good"]:
        return "verify calls it good, resume passes over it"
    return f"loaded others than those in the files: {told['differing']}" if told.get("differing") else None


def run_case(number: int, seed: int, *, origin: Path, directory: Path, config: Config) -> Outcome:
    """In a forked child that leads a group of its own."""
    of = random.Random(f"{seed}/{number}")
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(origin, directory)
    what, command = changed(of, directory / "run"), of.choice(("resume", "resume", "export", "rewind"))
    pid = os.fork()
    if pid == 0:
        answer(directory, lambda: child(directory / "run", config, command))
    status = waited(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if status or not (directory / "answer").is_file():
        log = (directory / "stderr").read_text(errors="replace")
        return Outcome(number, what, command, "ended", f"ended by {status}", log)
    told = json.loads((directory / "answer").read_text())
    problem, loaded = judged(told, command), told.get("loaded") if told.get("began") else None
    kind = f"{command}: {'good' if told.get('good') else 'damaged'}, code {told.get('code')}"
    return Outcome(
        number, what, command, f"{kind}, step {loaded}" if loaded else kind, problem, json.dumps(told)
    )


def answer(directory: Path, action: Callable[[], dict[str, Any]]) -> None:
    """Never returns."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(directory / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    device.peak_flops = lambda *of: 1e9
    try:
        told = action()
    except BaseException:  # noqa: BLE001  # it is what we look for
        told = {"traceback": traceback.format_exc()}
    (directory / "answer").write_text(json.dumps(told))
    os._exit(0)


def waited(pid: int) -> int:
    deadline_s = time.monotonic() + WALL_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def made(directory: Path) -> None:
    """A run of two ranks with two checkpoints, and its corpus."""
    words = random.Random(0)
    lines = [" ".join(words.choice(["one", "two", "three", "router"]) for _ in range(30)) for _ in range(40)]
    (directory / "corpus").mkdir()
    (directory / "corpus" / "a.txt").write_text("\n".join(lines))
    run_ranks(lambda: train.main([*RUN, *places(directory), "steps=2", "parallel=fsdp"]), 2)
    for step in (OLDER, NEWER):
        path = directory / "run" / "checkpoints" / step
        whole, own = read_whole(path), tensors(path)
        assert len(list(path.glob("rank-*"))) == 2
        assert all(
            whole[name].numpy().tobytes() == own[name].tobytes() for name in own if 0 not in own[name].shape
        )


def places(directory: Path) -> list[str]:
    paths = {
        "run_dir": directory,
        "data.source.path": directory / "corpus",
        "data.cache_dir": directory / "cache",
    }
    return [f"{key}={path}" for key, path in paths.items()]


def run_cases(num_cases: int, seed: int, *, first: int = 0) -> Iterator[Outcome]:
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory(prefix="triquetra-fuzz-") as directory:
        case, origin = Path(directory, "case"), Path(directory, "origin")
        case.mkdir()
        made(case)
        case.rename(origin)  # a run is bound to the paths of its data
        config = load([*RUN, *places(case), "steps=4"])  # composing it takes longer than a case
        gc.collect()
        gc.freeze()  # the children share these pages
        for number in range(first, first + num_cases):
            yield run_case(number, seed, origin=origin, directory=case, config=config)


def report(outcome: Outcome, seed: int) -> str:
    told = re.sub(r"\\n", "\n    ", outcome.told)[-1500:]
    return f"case {outcome.number} of seed {seed}: {outcome.problem}\n  {outcome.what}\n    {told}\n"


def main(num_cases: int = 200, seed: int = 0, first: int = 0) -> int:
    kinds, problems = Counter[str](), 0
    for outcome in until_told(run_cases(num_cases, seed, first=first)):
        kinds[outcome.kind] += 1
        if outcome.problem:
            problems += 1
            print(report(outcome, seed), flush=True)
    print(f"{kinds.total()} cases, {problems} with a problem")
    print("\n".join(f"  {count:6d}  {kind}" for kind, count in kinds.most_common()))
    return int(problems > 0)


if __name__ == "__main__":
    asked = cases_of("files", __doc__)
    sys.exit(main(asked.cases, asked.seed, asked.first))
