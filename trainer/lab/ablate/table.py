"""What does a study say? Means with 95 % intervals over seeds, and differences to the reference paired by
seed.
"""

import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from trainer.config import ConfigError, nearest
from trainer.lab.ablate.programs import Program, measure
from trainer.lab.ablate.study import Job, Study
from trainer.lab.ablate.workers import FINISHED
from trainer.lab.intervals import Estimate, estimate
from trainer.version import __version__

Results = dict[tuple[str, int], dict[str, Any]]  # (arm, seed) -> the record of the job, with its "values"


def results_of(
    study: Study, program: Program, records: dict[tuple[str, int], tuple[Job, dict[str, Any]]]
) -> Results:
    """Adds each metric of each job that came to its end. Raises: ConfigError for a key that no job
    recorded.
    """
    results, keys = {}, set()
    for place, (job, record) in records.items():
        rows = program.rows(job.directory) if record["outcome"] in ("ok", "collapsed") else []
        keys |= {key for row in rows for key in row}
        results[place] = {**record, "values": {name: measure(m, rows) for name, m in study.metrics.items()}}
    for name, metric in study.metrics.items():
        for key in filter(None, (metric.of, metric.minus)):
            if keys and key not in keys:
                raise ConfigError(
                    f"metrics.{name}: {key!r} was recorded by no job{nearest(key, sorted(keys))}"
                )
    return results


def values_of(results: Results, arm: str, metric: str) -> dict[int, float]:
    """Seed -> value, of the seeds that have one."""
    by_seed = {seed: record["values"][metric] for (a, seed), record in results.items() if a == arm}
    return {seed: value for seed, value in sorted(by_seed.items()) if value is not None}


def paired(results: Results, arm: str, reference: str, metric: str) -> Estimate | None:
    """The difference arm - reference over the seeds that both have."""
    ours, theirs = (values_of(results, a, metric) for a in (arm, reference))
    return estimate([ours[seed] - theirs[seed] for seed in ours if seed in theirs])


def as_json(study: Study, results: Results, *, name: str, command: str) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm, overrides in study.arms.items():
        outcomes = Counter(record["outcome"] for (a, _), record in results.items() if a == arm)
        arms[arm] = {"overrides": overrides, "outcomes": dict(outcomes), "metrics": {}, "differences": {}}
        for metric in study.metrics:
            values = values_of(results, arm, metric)
            mean = estimate(list(values.values()))
            change = paired(results, arm, study.reference, metric)
            arms[arm]["metrics"][metric] = {
                "values": values,
                **(mean.as_dict() if mean else {"num_seeds": 0}),
            }
            if arm != study.reference and change is not None:
                arms[arm]["differences"][metric] = {**change.as_dict(), "excludes_zero": change.excludes_zero}
    shown = ("arm", "seed", "outcome", "message", "seconds", "values")
    jobs = [{key: record[key] for key in shown} for record in results.values()]
    definition = {
        "program": study.program,
        "question": study.question,
        "seeds": study.seeds,
        "base": study.base,
        "reference": study.reference,
        "metrics": {key: vars(m) for key, m in study.metrics.items()},
    }
    return {
        "format": "triquetra-ablation",
        "version": 1,
        "study": name,
        "command": command,
        **definition,
        "environment": environment(),
        "arms": arms,
        "jobs": jobs,
    }


def environment() -> dict[str, str]:
    system = f"{platform.system()} {platform.machine()}, {cpu_model()}"
    return {
        "trainer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": system,
    }


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def markdown(study: Study, results: Results, *, name: str, command: str) -> str:
    """The page: the question, the tables, what went wrong, and how to make it again."""
    present = [arm for arm in study.arms if any(a == arm for a, _ in results)]
    seen = Counter(record["outcome"] for record in results.values())
    seconds = sum(record["seconds"] for record in results.values())
    env = environment()
    parts = [f"# {name}", study.question, means(study, results, present, seen)]
    others = [arm for arm in present if arm != study.reference]
    if others and study.reference in present:
        parts += [f"Difference to `{study.reference}`, paired by seed:", changes(study, results, others)]
    parts.append(
        "\n".join(
            f"- {line}" for line in notes(study, results, seen, num_changes=len(others) * len(study.metrics))
        )
    )
    base = " ".join(study.base) or "nothing"
    arms = [f"- `{arm}`: {' '.join(f'`{o}`' for o in study.arms[arm]) or 'no change'}" for arm in study.arms]
    parts += [f"Made by `{command}`. All arms: `{base}`. Arms:", "\n".join(arms)]
    parts.append(
        f"{len(results)} jobs, {seconds / 3600:.2f} hours of one thread in all; Triquetra {env['trainer']}, "
        f"torch {env['torch']}, Python {env['python']}, {env['machine']}."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def means(study: Study, results: Results, arms: list[str], seen: Counter) -> str:
    shown = [outcome for outcome in ("collapsed", "diverged", "failed") if seen[outcome]]
    rows = []
    for arm in arms:
        outcomes = Counter(record["outcome"] for (a, _), record in results.items() if a == arm)
        finished = sum(ended(results, arm, seed) for seed in range(study.seeds))
        cells = [
            cell(estimate(list(values_of(results, arm, m).values())), of=finished) for m in study.metrics
        ]
        rows.append([f"`{arm}`", str(finished), *(str(outcomes[outcome]) for outcome in shown), *cells])
    return grid(["arm", "seeds", *shown, *study.metrics], rows)


def changes(study: Study, results: Results, arms: list[str]) -> str:
    rows = []
    for arm in arms:
        differences = [paired(results, arm, study.reference, m) for m in study.metrics]
        pairs = sum(
            all(ended(results, a, seed) for a in (arm, study.reference)) for seed in range(study.seeds)
        )
        rows.append(
            [f"`{arm}`", *(cell(e, of=pairs) + (" *" if e and e.excludes_zero else "") for e in differences)]
        )
    return grid(["arm", *study.metrics], rows)


def ended(results: Results, arm: str, seed: int) -> bool:
    return (arm, seed) in results and results[arm, seed]["outcome"] in FINISHED


def cell(mean: Estimate | None, *, of: int) -> str:
    if mean is None:
        return "none"
    return f"{mean}" if mean.num_seeds == of else f"{mean} ({mean.num_seeds} of {of})"


def grid(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well as text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def notes(study: Study, results: Results, seen: Counter, *, num_changes: int) -> list[str]:
    lines = ["mean ± half of the 95 % interval (Student's t over seeds); one seed has no interval"]
    if num_changes:
        lines.append(
            f"\\* the interval excludes 0; among {num_changes} comparisons {num_changes / 20:.1f} would "
            "by chance alone"
        )
    lines += [f"{name}: {describe(metric)}" for name, metric in study.metrics.items()]
    if seen["collapsed"]:
        lines.append("collapsed: trained to the end with a dead or overloaded expert, numbers included")
    if seen["diverged"]:
        lines.append(
            "diverged: loss or gradient not finite before the end; such a run has no numbers, which "
            "favours its arm"
        )
    for record in results.values():
        if record["outcome"] in ("diverged", "failed"):
            message = " ".join(record["message"].split())
            lines.append(f"{record['arm']} seed {record['seed']} {record['outcome']}: {message[:200]}")
    return lines


def describe(metric: Any) -> str:
    key = f"`{metric.of}`" + (f" - `{metric.minus}`" if metric.minus else "")
    steps = "" if metric.share == 1 else f" over the last {metric.share * 100:g} % of the steps"
    take = {
        "first_below": f"first step below {metric.level}",
        "first_above": f"first step above {metric.level}",
        "spread": "standard deviation around the line of best fit",
        "lag_1": "correlation of neighbouring steps, around the line of best fit,",
    }
    return f"{take.get(metric.take, metric.take)} of {key}{steps}"


def write(directory: Path, page: str, data: dict[str, Any]) -> None:
    (directory / "study.json").write_text(json.dumps(data, indent=1))
    (directory / "study.md").write_text(page)
