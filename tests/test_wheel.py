"""Does what `pip install` puts on a machine run there, without the checkout?

The wheel is built once by its own backend and unpacked; commands run from an empty directory as the installed
script runs them. Expected files are those of the checkout.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = (
    "import sys\nfrom trainer.__main__ import main\nsys.exit(main())\n"  # what pip makes of the entry point
)
TINY = [
    "experiment=demo",
    "model=debug",
    "name=tiny",
    "steps=2",
    "seq_len=32",
    "global_batch=2",
    "micro_batch=2",
    "data=synthetic",
    "data.workers=0",
    "data.buffer=0",
]
RULE = "from trainer.balance import SignRule\n\n\nclass Mine(SignRule):\n    pass\n"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    """The files of the wheel, and bin/triquetra."""
    directory = tmp_path_factory.mktemp("wheel")
    build = f"from hatchling.build import build_wheel; print(build_wheel({str(directory)!r}))"
    done = subprocess.run([sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(directory / done.stdout.split()[-1]) as wheel:
        wheel.extractall(directory / "site")
    (directory / "bin").mkdir()
    (directory / "bin" / "triquetra").write_text(SCRIPT)
    return directory


def triquetra(unpacked: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(unpacked / "bin" / "triquetra"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(unpacked / "site"), "HOME": str(cwd)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def files_below(directory: Path) -> set[str]:
    paths = (path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(directory)) for path in paths}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(unpacked):
    held = files_below(unpacked / "site")
    (metadata,) = {Path(file).parts[0] for file in held if ".dist-info" in file}
    expected = {f"trainer/{file}" for file in files_below(ROOT / "trainer")}
    expected |= {f"trainer/configs/{file}" for file in files_below(ROOT / "configs")}
    assert {file for file in held if not file.startswith(metadata)} == expected
    assert {"trainer/lab/page.html", "trainer/lab/heatmap.js"} < held
    entry_points = (unpacked / "site" / metadata / "entry_points.txt").read_text()
    assert "triquetra = trainer.__main__:main" in entry_points


def test_the_first_words_need_no_torch(unpacked, tmp_path):
    """`--help` and `--version` answer at once: they import nothing but the standard library."""
    site = {"PYTHONPATH": str(unpacked / "site")}
    program = (
        "import sys; from trainer.__main__ import main; main(['--help']); main(['--version']);"
        "print(sorted({'torch', 'numpy', 'hydra'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | site, capture_output=True, text=True)
    version = (ROOT / "trainer" / "version.py").read_text().split('__version__ = "')[1].split('"')[0]
    assert done.stdout.splitlines()[-2:] == [f"triquetra {version}", "[]"], done.stderr


@pytest.mark.slow
def test_it_trains_with_a_rule_from_the_directory_it_is_started_in(unpacked, tmp_path):
    (tmp_path / "my_rule.py").write_text(RULE)
    rule = ["balance=sign", "balance.rule._target_=my_rule.Mine"]
    done = triquetra(unpacked, tmp_path, "train", *TINY, *rule)
    assert done.returncode in (0, 3), done.stderr  # two steps: its balance is not what this test is about
    lines = (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_it_previews_from_an_empty_directory(unpacked, tmp_path):
    """The page's template and the configurations are the wheel's own."""
    done = triquetra(unpacked, tmp_path, "preview", *TINY)
    assert done.returncode == 0, done.stderr
    assert "In all: tokens 128 · steps 2" in done.stdout
    assert (tmp_path / "runs/tiny/preview.html").read_text().startswith("<!")
