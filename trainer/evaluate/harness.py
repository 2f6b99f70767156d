"""What does lm-evaluation-harness say of exported weights? Its tasks, its rules, its numbers.

The harness reads the export with transformers, in float32, and never asks our model: its numbers are those
that others publish, and an oracle for `Task` (docs/benchmarks/harness.md).
"""

import json
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError, ModelConfig
from trainer.model.hf import KEYS, rows_are_aligned

MICRO_BATCH = 8  # [rows]
# their clients read these when they are imported; a value that the user has set stays
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")


def run_harness(
    directory: Path, tasks: Sequence[str], *, include_path: Path | None = None, samples: bool = False
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` returns for an exported directory. samples: also for each question.

    include_path: a directory of YAML tasks of the user's own. Raises: ConfigError.
    """
    refuse_unusable(directory, include_path)
    for name in OFFLINE:
        os.environ.setdefault(name, "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path and str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(
            f"--harness: {', '.join(unknown)}: is no task of lm_eval; `lm_eval ls tasks` lists them, and "
            "--include-path=DIR adds those of DIR/*.yaml"
        )
    try:
        return simple_evaluate(
            model="hf",
            model_args=model_arguments(directory),
            tasks=list(tasks),
            batch_size=MICRO_BATCH,
            device="cuda" if torch.cuda.is_available() else "cpu",
            task_manager=manager,
            log_samples=samples,
        )
    except Exception as error:  # whatever a task, its data or transformers raises
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "without a network its data must be in the cache: HF_HUB_OFFLINE=0 HF_DATASETS_OFFLINE=0"
        raise ConfigError(f"--harness: {', '.join(tasks)}: {reason} ({remedy} lets it be fetched)") from error


def refuse_unusable(directory: Path, include_path: Path | None) -> None:
    """Raises: ConfigError."""
    if missing := [name for name in ("lm_eval", "accelerate", "transformers") if find_spec(name) is None]:
        raise ConfigError(f"--harness needs {', '.join(missing)}: pip install 'triquetra[harness]'")
    if not (directory / "config.json").is_file():
        remedy = "`triquetra export RUN OUT` makes one"
        raise ConfigError(f"{directory}: --harness takes a directory of exported weights; {remedy}")
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{directory}: has no tokenizer.json, and the tasks of a harness are text")
    if include_path is not None and not list(include_path.rglob("*.yaml")):
        raise ConfigError(f"--include-path={include_path}: holds no *.yaml; give the directory of your tasks")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("--harness runs in one process; start it without torchrun")


def model_arguments(directory: Path) -> dict[str, Any]:
    """float32 as everywhere on a CPU, and experts that can be computed with these shapes."""
    told = json.loads((directory / "config.json").read_text())
    shape = ModelConfig(**{ours: told[theirs] for ours, theirs in KEYS.items() if theirs in told})
    experts = {} if rows_are_aligned(shape) else {"experts_implementation": "eager"}
    return {"pretrained": str(directory), "dtype": "float32", **experts}


def lines_of(results: dict[str, Any]) -> list[str]:
    """One for each task or group: its numbers in the order of the harness, with their standard errors."""
    lines = list[str]()
    for task, values in results["results"].items():
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        shown = ", ".join(f"{name.removesuffix(',none')} {value:.4g}" for name, value in numbers.items())
        lines.append(f"{task}: {shown}")
    return lines
