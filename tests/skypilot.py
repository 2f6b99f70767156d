"""Does SkyPilot take launch/skypilot.yaml? Asked of SkyPilot itself, offline, in an environment of its own.

make sky      or: python tests/skypilot.py, where skypilot is installed
"""

import sys
from pathlib import Path

import sky

FILE = Path(__file__).parent.parent / "launch" / "skypilot.yaml"
SLIPS = {
    "num_nodes: 2": "num_node: 2",
    "num_nodes: 2\n": "num_nodes: two\n",
    "accelerators: ": "acelerators: ",
    "recover_on_exit_codes: [1,": "recover_on_exit_codes: [one,",
}


def refuses(text: str, directory: Path) -> bool:
    path = directory / "slip.yaml"
    path.write_text(text)
    try:
        sky.Task.from_yaml(str(path))
    except (ValueError, sky.exceptions.InvalidSkyPilotConfigError):
        return True
    return False


def main(directory: Path) -> int:
    task = sky.Task.from_yaml(str(FILE))
    (resources,) = task.resources
    assert task.num_nodes == 2 and resources.accelerators == {"H200": 8}, task
    assert list(task.volumes) == ["/runs"], task.volumes
    text = FILE.read_text()
    for right, wrong in SLIPS.items():
        assert text.count(right) >= 1 and refuses(text.replace(right, wrong), directory), wrong
    print(f"SkyPilot {sky.__version__} takes {FILE.name}, and refuses {len(SLIPS)} slips")
    return 0


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch)))
