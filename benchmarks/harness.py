"""Does lm-evaluation-harness say of an export what `Task` says of it?

    pip install 'triquetra[harness]' && python -m benchmarks.harness [steps]

Trains a tiny model on Python's standard library for some steps (40), exports it, and asks the questions of
tests/tasks both ways: by `triquetra evaluate OUT`, and by the harness, for which they are written as local
YAML tasks. Ends with 1 if a number differs.
"""

import json
import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from trainer import train
from trainer.evaluate.__main__ import exported, made
from trainer.evaluate.harness import lines_of, run_harness
from trainer.ranks.stop import StopRequest
from trainer.weights.export import main as export

TASKS = Path(__file__).parent.parent / "tests" / "tasks"
NAMES = ("arithmetic", "brackets", "repeat")
SETTINGS = [
    *("model=debug", "model.num_layers=4", "model.vocab_size=512", "seq_len=128", "global_batch=16"),
    *("micro_batch=4", "data.workers=0", "optim.lr=1e-2", "checkpoint.interval=1000", "name=tiny"),
]
# theirs -> ours
METRICS = {"acc": "accuracy", "acc_bytes": "accuracy_per_byte", "exact_match": "exact"}
LIMIT = 1e-4  # [bits per byte]


def main() -> int:
    steps = sys.argv[1] if len(sys.argv) > 1 else "40"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        train.main([*SETTINGS, f"steps={steps}", f"run_dir={directory}"])
        if export([str(directory / "tiny"), str(directory / "out")]):
            raise SystemExit("the export failed")
        theirs = of_harness(directory)
        ours = of_task(directory)
    packages = ", ".join(f"{name} {version(name)}" for name in ("lm_eval", "transformers", "torch"))
    print(f"\n{packages}, {torch.get_num_threads()} threads")
    differ = 0
    for task in NAMES:
        for number in (*METRICS.values(), "bits_per_byte"):
            if number not in ours[task]:  # a cloze has one choice
                continue
            a, b = ours[task][number], theirs[task][number]
            is_same = abs(a - b) <= (LIMIT if number == "bits_per_byte" else 0)
            differ += not is_same
            print(f"{task:10s} {number:17s} ours {a:.6f}  harness {b:.6f}{'' if is_same else '  DIFFERS'}")
    return 1 if differ else 0


def of_harness(directory: Path) -> dict[str, dict[str, float]]:
    tasks = directory / "tasks"
    tasks.mkdir()
    for name in NAMES:
        write_task(tasks, name)
    results = run_harness(
        directory / "out", [f"own_{name}" for name in NAMES], include_path=tasks, samples=True
    )
    print("\n".join(lines_of(results)))
    return {name: numbers(results, f"own_{name}") for name in NAMES}


def numbers(results: dict[str, Any], task: str) -> dict[str, float]:
    """The harness' own metrics; bits per byte from its log-likelihoods of the right answers."""
    values = {ours: results["results"][task][f"{theirs},none"] for theirs, ours in METRICS.items()}
    nats = num_bytes = 0.0
    for sample in results["samples"][task]:
        gold = sample["doc"].get("gold", 0)
        nats -= sample["filtered_resps"][gold][0]
        num_bytes += len(sample["doc"]["choices"][gold].encode())
    return values | {"bits_per_byte": nats / math.log(2) / num_bytes}


def write_task(directory: Path, name: str) -> None:
    """A task of the harness on the same file. JSON is YAML."""
    task = {
        "task": f"own_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(TASKS / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{gold|default(0)}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS
        ],
        "metadata": {"version": 1},
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task, indent=1))


def of_task(directory: Path) -> dict[str, dict[str, float]]:
    nodes = [
        f"evaluate.{name}={{_target_: trainer.evaluate.Task, path: {TASKS / name}.jsonl}}" for name in NAMES
    ]
    with StopRequest() as stop:
        run = exported(directory / "out", [*nodes, "seq_len=128"], scratch=str(directory), stop=stop)
        return {result["evaluation"]: result for result in made(run)}


if __name__ == "__main__":
    sys.exit(main())
