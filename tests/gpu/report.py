"""What became of the stages: one table for the terminal, gpu.md and gpu.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]  # of a stage, as stages.run_stage returns it


def is_good(results: Sequence[Result]) -> bool:
    return all(result["outcome"] == "holds" for result in results)


def write(directory: Path, results: Sequence[Result]) -> None:
    (directory / "gpu.json").write_text(json.dumps({"format": 1, "stages": list(results)}, indent=1) + "\n")
    (directory / "gpu.md").write_text(as_markdown(results))


def as_markdown(results: Sequence[Result]) -> str:
    parts = ["# GPU suite\n", table(results)]
    for result in results:
        parts.append(f"\n## {result['stage']}: {result['question']}\n")
        parts += [f"**{check['name']} failed**\n\n```text\n{check['error']}```\n" for check in failed(result)]
        if result["figures"]:
            parts.append(rows(["check", "figure", "value", "bar", "holds"], figures_of(result)))
    return "\n".join(parts)


def figures_of(result: Result) -> list[list[str]]:
    holds = {True: "yes", False: "**NO**", None: ""}
    return [
        [f["check"], f["name"], f"{shown(f['value'])} {f['unit']}".strip(), f["bar"], holds[f["holds"]]]
        for f in result["figures"]
    ]


def table(results: Sequence[Result]) -> str:
    """One line a stage."""
    lines = []
    for result in results:
        judged = [figure for figure in result["figures"] if figure["holds"] is not None]
        held = sum(figure["holds"] for figure in judged)
        seconds = f"{result['seconds']:.0f} of {result['limit_s']:.0f}"
        lines.append([result["stage"], result["outcome"], f"{held} of {len(judged)}", seconds])
    return rows(["stage", "outcome", "bars that hold", "seconds"], lines)


def rows(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown, its columns lined up."""
    plain = [[cell.replace("|", "/").replace("\n", " ") for cell in line] for line in [head, *lines]]
    widths = [max(len(line[i]) for line in plain) for i in range(len(head))]
    texts = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in plain
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts) + "\n"


def troubles(result: Result) -> list[str]:
    """What a reader at the terminal wants to know of a stage that does not hold, a line each."""
    lines = [f"{check['name']}: {check['error'].strip().splitlines()[-1]}" for check in failed(result)]
    lines += [
        f"{f['check']}: {f['name']}: {shown(f['value'])} {f['unit']}, the bar is {f['bar']}"
        for f in result["figures"]
        if f["holds"] is False
    ]
    return lines


def failed(result: Result) -> list[Mapping[str, Any]]:
    return [check for check in result["checks"] if check["error"]]


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
