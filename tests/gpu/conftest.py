"""The stages as tests: only where they are asked for with `-m gpu`, and only where there is a GPU.

tests/conftest.py hides GPUs from the process of the tests. The stages run in processes of their own, which
see them again (stages.environment).
"""

from pathlib import Path

import pytest

LEFT_OUT = pytest.StashKey[str]()


def has_gpu() -> bool:
    """As the driver has it; torch itself is asked in the stage's process."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    stages = [item for item in items if item.get_closest_marker("gpu")]
    asked = "gpu" in config.option.markexpr
    if not stages or config.option.collectonly or (asked and has_gpu()):
        return
    items[:] = [item for item in items if item not in stages]
    config.hook.pytest_deselected(items=stages)
    why = "no GPU here" if not has_gpu() else "`make gpu` runs them, or `pytest -m gpu tests/gpu`"
    config.stash[LEFT_OUT] = f"tests/gpu: {len(stages)} stages were left out: {why}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if (line := config.stash.get(LEFT_OUT, None)) is not None:
        terminalreporter.write_line(line)
