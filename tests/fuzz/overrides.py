"""Does every command line end in a run or in one line that says what is wrong?

    python -m tests.fuzz.overrides [CASES] [SEED] [FIRST]

A case is a tiny run of two steps with one to three overrides that are drawn at random: extreme numbers, wrong
types, nothing, other alphabets, lists, interpolations, keys left out and keys added. It runs in a forked
child with limits of its own. It must end with a documented code, with one line `error: ...` where that code
says so, and without a traceback. CASES: 200 · SEED: 0; case n of a seed is the same whatever CASES is.
"""

import gc
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tests.fuzz import cases_of, until_told
from trainer import train
from trainer.config import CONFIG_DIR, load
from trainer.ranks import device, stop

BASE = [
    "model=debug",
    "model.num_layers=2",
    "model.global_every=2",
    "model.dim=16",
    "model.ffn_dim=16",
    "model.expert_dim=16",
    "model.num_experts=4",
    "model.vocab_size=128",
    "data=synthetic",
    "data.source.mean_length=20",
    "data.source.num_documents=1000",
    "data.workers=0",
    "data.retry_s=0",
    "seq_len=16",
    "global_batch=2",
    "micro_batch=1",
    "steps=2",
    "name=run",
    "checkpoint.retry_s=0",
]
STEPS = 2  # after them a run is told to end: an override may have asked for more
CPU_S, WALL_S = 60, 240  # [s] of a case: against a hang, on a machine that is busy with other work
MEMORY_BYTES = 24 * 2**30  # of addresses
DRAWN_SIZE = 200  # [characters] of an override that a report shows whole

INTEGERS = ["-9223372036854775809", "-1000000007", "-1", "0", "1", "2", "3", "7", "16", "17", "1000000007"]
INTEGERS += ["2147483648", "9223372036854775807", "18446744073709551616", "1" + "0" * 40, "9" * 5000]
FLOATS = ["nan", "inf", "-inf", "-0.0", "1e-320", "-1e-320", "1e30", "-1e30", "1e308", "0.5", "1.5", "1e-8"]
WORDS = [
    "",
    "''",
    "' '",
    "null",
    "true",
    "off",
    "x",
    "none",
    "wsd",
    "???",
    "a/b",
    "..",
    "/",
    "'a b'",
    "Ω",
    "日本",
]
WORDS += ["'\U0001f600'", "'\u202e'", "'a\nb'", "'\t'", "'" + "x" * 300 + "'", "'=,:'", "'\\'", "%d", "{}"]
NODES = ["[]", "[1]", "[a,b]", "[nan]", "[[]]", "{}", "{a: 1}", "{_target_: os.getcwd}", "{_target_: x}"]
NODES += ["{_target_: trainer.data.PythonSource, _partial_: true}", "{to: nan}", "{from: 1, to: 1e400}"]
LINKS = [
    "${seed}",
    "${model.dim}",
    "${nowhere}",
    "${oc.env:TRIQUETRA_NOT_SET}",
    "${model}",
    "${optim.lr}",
    "${",
]
BROKEN = ["{", "]", "'", '"', "a,b", "1,2", "glob(*)", "range(1,3)", "choice(1,2)", "\\", "$", "=", "{a:"]
ANY = [INTEGERS, FLOATS, WORDS, NODES, LINKS, BROKEN]

# code: how many lines begin with "error:"
DOCUMENTED = {
    stop.OK: (0,),
    stop.REFUSED: (1,),
    stop.COLLAPSED: (0,),
    stop.NO_DATA: (1,),
    stop.CANNOT_SAVE: (1,),
    stop.UNSOUND: (0, 1),
    stop.PREEMPTED: (0,),
}


class Outcome(NamedTuple):
    number: int
    overrides: list[str]
    code: int | None  # negative: ended by a signal
    problem: str | None  # None: as it must be
    cpu_s: float
    stderr: str

    @property
    def kind(self) -> str:
        return self.problem or NAMES.get(self.code, str(self.code))


NAMES = {
    getattr(stop, name): name
    for name in ("OK", "REFUSED", "COLLAPSED", "NO_DATA", "CANNOT_SAVE", "UNSOUND", "PREEMPTED")
}


# -- drawing ----------------------------------------------------------------------------------------------


def keys_of(node: object, prefix: str = "") -> Iterator[str]:
    """Every key, of groups and of what lies in them."""
    values = vars(node) if is_dataclass(node) else node
    if isinstance(values, dict):
        for name, value in values.items():
            yield f"{prefix}{name}"
            yield from keys_of(value, f"{prefix}{name}.")


def drawn_keys() -> list[str]:
    """Of the schema, of the chosen `_target_` nodes, and of those that may be chosen in their place."""
    span = "stage.warmup."
    spans = [
        f"{span}{key}" for key in ("tokens", "until", "steps", "share", "lr", "bias_rate", "global_batch")
    ]
    spans += [
        f"{span}{key}" for key in ("micro_batch", "seq_len", "z_loss_weight", "mixture", "buffer", "drain")
    ]
    return sorted({*keys_of(load(BASE)), *spans, "stage.decay.lr.to", "+stage.new", "+stage.new.steps"})


CHOICES = {
    group: sorted(of.stem for of in (CONFIG_DIR / group).glob("*.yaml"))
    for group in ("balance", "optim", "stage", "guard", "parallel", "logging", "data")
}
OF_CHOICE = {  # keys that only some choice has
    "balance": ["lr", "beta", "kappa", "kp", "ki", "kd", "ema", "rate", "rho", "memory", "max_lr"],
    "optim": ["lr", "adamw_lr", "momentum", "betas", "eps", "weight_decay", "dtype", "router"],
}


def draw(seed: int, number: int, keys: list[str]) -> list[str]:
    """The overrides of a case; a function of the seed and its number."""
    of = random.Random(f"{seed}/{number}")
    return [override for _ in range(of.choice((1, 1, 1, 2, 3))) for override in one(of, keys)]


def one(of: random.Random, keys: list[str]) -> list[str]:
    value = of.choice(of.choice(ANY))
    match of.randrange(10):
        case 0:
            group = of.choice(sorted(CHOICES))
            option = of.choice([*CHOICES[group], value])
            # a corpus on the hub would be looked for in the network
            return [f"{group}={option}"] if option not in ("hub", "fineweb", "wandb") else []
        case 1:
            group = of.choice(sorted(OF_CHOICE))
            inner = "rule." if group == "balance" else ""
            option = of.choice([option for option in CHOICES[group] if option != "none"])
            return [f"{group}={option}", f"{group}.{inner}{of.choice(OF_CHOICE[group])}={value}"]
        case 2:
            return [of.choice("~+") + of.choice(keys).lstrip("+") + of.choice(["", f"={value}"])]
        case 3:
            return [of.choice(["data=txt", "data=jsonl"]), f"data.source.path={value}"]
        case 4 | 5:
            return [f"{of.choice(keys)}={of.choice(of.choice((INTEGERS, FLOATS)))}"]
        case 6:
            return [
                of.choice([value, f"{value}={value}", f"{of.choice(keys)}.{value}={value}", f"++a.b={value}"])
            ]
        case _:
            return [f"{of.choice(keys)}={value}"]


# -- running ----------------------------------------------------------------------------------------------


def run_case(number: int, overrides: list[str], directory: Path) -> Outcome:
    """In a forked child that leads a group of its own."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    pid = os.fork()
    if pid == 0:
        child(directory, [*based_on(overrides), f"run_dir={directory}", *overrides])
    status, usage = waited(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    stderr = (directory / ".stderr").read_text(errors="replace")
    problem = judged(code, stderr)
    return Outcome(number, overrides, code, problem, usage.ru_utime + usage.ru_stime, stderr)


def based_on(overrides: list[str]) -> list[str]:
    """The tiny run, without what the choice of another corpus has no keys for."""
    others = any(override.startswith("data=") for override in overrides)
    return [override for override in BASE if not (others and override.startswith("data.source."))]


def waited(pid: int) -> tuple[int, resource.struct_rusage]:
    deadline_s = time.monotonic() + WALL_S
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return status, usage
        if time.monotonic() > deadline_s:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def child(directory: Path, overrides: list[str]) -> None:
    """Never returns. The code that main gives is the child's."""
    code = 99  # of what main raises
    try:
        os.setsid()
        os.chdir(directory)
        for number, name in ((1, ".stdout"), (2, ".stderr")):
            os.dup2(os.open(directory / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has others
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ["XDG_CACHE_HOME"] = str(directory / ".cache")
        device.peak_flops = lambda *of: 1e9  # measuring it takes longer than the steps
        end_after_steps()
        code = train.main(overrides)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 98
    except BaseException:  # noqa: BLE001  # it is what we look for
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end_after_steps() -> None:
    original = train.train_step

    def train_step(run, batches, **timing):
        if run.step + 1 >= STEPS < run.last_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batches, **timing)

    train.train_step = train_step


def judged(code: int, stderr: str) -> str | None:
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    if "Traceback" in stderr or code == 99:
        return "traceback"
    if code == -signal.SIGXCPU:
        return f"no answer in {CPU_S} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if code not in DOCUMENTED:
        return f"code {code} is not documented"
    if len(errors) not in DOCUMENTED[code]:
        return f"{len(errors)} lines of error with code {code}"
    others = [
        line for line in stderr.splitlines() if line.strip() and not line.startswith(("error:", "WARNING"))
    ]
    return "several lines" if code == stop.REFUSED and others else None


def run_cases(num_cases: int, seed: int, *, first: int = 0) -> Iterator[Outcome]:
    """Cases first to first + num_cases - 1, one after another."""
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    keys = drawn_keys()
    gc.collect()
    gc.freeze()  # the children share these pages
    with tempfile.TemporaryDirectory(prefix="triquetra-fuzz-") as directory:
        for number in range(first, first + num_cases):
            yield run_case(number, draw(seed, number, keys), Path(directory, "case"))


def report(outcome: Outcome, seed: int) -> str:
    shown = " ".join(repr(o if len(o) <= DRAWN_SIZE else f"{o[:DRAWN_SIZE]}...") for o in outcome.overrides)
    last = "\n".join(outcome.stderr.splitlines()[-4:])
    return f"case {outcome.number} of seed {seed}: {outcome.problem}\n  {shown}\n{last}\n"


def table(outcomes: list[Outcome]) -> str:
    counts, cpu_s = Counter(outcome.kind for outcome in outcomes), sum(of.cpu_s for of in outcomes)
    rows = [f"  {count:6d}  {kind}" for kind, count in counts.most_common()]
    return "\n".join([f"{len(outcomes)} cases, {cpu_s:.0f} s of CPU", *rows])


def main(num_cases: int = 200, seed: int = 0, first: int = 0) -> int:
    outcomes = []
    for outcome in until_told(run_cases(num_cases, seed, first=first)):
        outcomes.append(outcome)
        if outcome.problem:
            print(report(outcome, seed), flush=True)
    print(table(outcomes))
    return int(any(outcome.problem for outcome in outcomes))


if __name__ == "__main__":
    asked = cases_of("overrides", __doc__)
    sys.exit(main(asked.cases, asked.seed, asked.first))
