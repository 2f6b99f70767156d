"""Every stage as a test; `python -m tests.gpu` runs the same, and writes a table besides."""

import pytest

from tests.gpu.report import troubles
from tests.gpu.stages import ONE_GPU, run_stage


@pytest.mark.gpu
@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, id=stage.name, marks=pytest.mark.timeout(stage.limit_s + 60)) for stage in ONE_GPU],
)
def test_stage_holds(stage, tmp_path):
    result = run_stage(stage, tmp_path, device="cuda")
    log = (tmp_path / result["log"]).read_text()[-3000:]
    assert result["outcome"] == "holds", "\n".join([*troubles(result), log])
