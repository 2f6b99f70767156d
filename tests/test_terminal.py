"""Does every command outlive its terminal: closed, full, gone, or without the letters that are printed?"""

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path

import pytest

from trainer import terminal, train
from trainer.__main__ import COMMANDS, COMPOSED
from trainer.config.limits import OF_A_RUN

REPOSITORY = Path(__file__).parent.parent
# speaks in every way that a command does, and says on a descriptor of its own that it came to its end
SPEAKS = """
import logging, os, sys
from trainer import terminal

def speak():
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from rich.console import Console
    from rich.progress import Progress
    for i in range(3):
        print("line · ä \\udcff", i, flush=i == 1)
        logging.warning("warning · %d", i)
        print("x" * 10000, file=sys.stderr)
    with Progress(console=Console(force_terminal=True)) as bar:
        bar.update(bar.add_task("· bar", total=2), completed=1, refresh=True)
    Console().print("table ·")
    os.write(int(sys.argv[1]), b"came to its end")
    if len(sys.argv) > 2:
        raise ValueError("refused · \\udcff")
    return 7

code = terminal.run(speak, {ValueError: 2})
print("not flushed by hand")
sys.exit(code)
"""


def spoken(redirection: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, what was said on the descriptor of its own, and what stdout and stderr still show."""
    reading, writing = os.pipe()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command = f'{sys.executable} -c "$SPEAKS" {writing} {" ".join(arguments)} {redirection}'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env={**clean, "SPEAKS": SPEAKS, "PYTHONPATH": str(REPOSITORY), **environment},
        pass_fds=[writing],
        capture_output=True,
        text=True,
        timeout=250,
    )
    os.close(writing)
    with os.fdopen(reading) as file:
        return done.returncode, file.read(), done.stdout + done.stderr


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
        "| head -c 5",
    ],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_outlives_its_terminal(redirection, unbuffered):
    """Exit code and work are as with a terminal; neither a traceback nor a complaint of the interpreter's
    exit reaches the stream that is left."""
    code, said, left = spoken(redirection, PYTHONUNBUFFERED=unbuffered)
    assert (code, said) == (7, "came to its end"), left[-500:]
    for complaint in ("Traceback", "Exception ignored", "Error"):
        assert complaint not in left


def test_a_refusal_keeps_its_code_without_a_terminal():
    assert spoken("2>&-", "refuse")[:2] == (2, "came to its end")
    code, _, left = spoken("", "refuse")
    assert code == 2 and "error: refused" in left and "Traceback" not in left


def test_letters_that_cannot_be_encoded_are_replaced():
    code, said, left = spoken("", PYTHONIOENCODING="ascii")
    assert (code, said) == (7, "came to its end")
    assert "line ? ? ? 0" in left and "warning ? 2" in left and "Traceback" not in left


def test_nothing_that_is_opened_later_is_printed_into(tmp_path):
    """Without descriptors 1 and 2 the next files that are opened would get these numbers."""
    code = """
import os, sys
from trainer import terminal

def speak():
    with open(sys.argv[1], "w") as file:
        os.system("echo of a child")
        os.write(1, b"of a library")
        os.write(2, b"of a library")
        file.write("content")
    return 0

sys.exit(terminal.run(speak, {}))
"""
    subprocess.run(
        ["bash", "-c", '"$0" -c "$1" "$2" >&- 2>&- <&-', sys.executable, code, str(tmp_path / "file")],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=250,
    )
    assert (tmp_path / "file").read_text() == "content"


def test_streams_that_somebody_put_there_are_left_alone(capsys):
    """As a notebook's, or a test's."""
    before = sys.stdout, sys.stderr
    assert terminal.run(lambda: print("captured") or 3, {}) == 3
    assert (sys.stdout, sys.stderr) == before and capsys.readouterr().out == "captured\n"


def test_an_error_is_one_line_its_notes_and_its_code(capsys):
    def refuse():
        error = KeyError("key")
        error.add_note("a note")
        raise error

    assert terminal.run(refuse, {ValueError: 4, LookupError: 5}) == 5
    assert capsys.readouterr().err == "error: 'key'\na note\n"

    def interrupt():
        raise KeyboardInterrupt

    assert terminal.run(interrupt, {KeyboardInterrupt: 130}, interrupted="nothing was written") == 130
    assert capsys.readouterr().err == "nothing was written\n"
    with pytest.raises(KeyError):
        terminal.run(refuse, {ValueError: 4})


def test_lines_come_in_their_order_from_an_unbuffered_interpreter():
    """Containers set PYTHONUNBUFFERED; the stream that is put in stdout's place must not hold lines back."""
    code = """
import sys
from trainer.terminal import outlive_terminal
outlive_terminal()
outlive_terminal()
print(1)
print(2, file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-u", "-c", code],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.stdout == "1\n2\n"


@pytest.mark.parametrize("arguments", [["train", "--help"], ["preview", "experiment=demo"], ["nonsense"]])
def test_commands_speak_ascii_and_outlive_a_full_disk(tmp_path, arguments):
    """The code is that of a good terminal: 2 of what is refused, else 0."""
    command = [sys.executable, "-m", "trainer", *arguments]
    command += [f"out={tmp_path}/page.html"] if arguments[0] == "preview" else []
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240
        )
    expected = 2 if arguments == ["nonsense"] else 0
    assert done.returncode == expected and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("command", COMPOSED)
def test_help_is_that_of_the_command_and_needs_no_torch(command, capsys):
    assert import_module(COMMANDS[command]).main(["--help"]) == 0
    expected = capsys.readouterr().out
    code = (
        f"import sys, trainer.__main__ as m; m.main([{command!r}, '-h']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_by_terminal_run(command, monkeypatch):
    """Its `main` does nothing but hand what it does and its codes over."""
    seen = []
    monkeypatch.setattr(terminal, "run", lambda command, codes, **how: seen.append(codes) or 99)
    assert import_module(COMMANDS[command]).main(["--help"]) == 99
    assert seen[0][KeyboardInterrupt] == 130


SMALL = [
    *["model=debug", "model.num_layers=2", "model.global_every=2", "model.dim=32", "model.vocab_size=256"],
    *["data=synthetic", "data.source.mean_length=40", "data.workers=0", "seq_len=16", "global_batch=4"],
    *["micro_batch=4", "steps=4", "name=run", "balance.trace=router.trace"],
]


@pytest.mark.slow
def test_a_training_run_outlives_its_terminal(tmp_path):
    """A terminal that goes away after the first word: the progress bar and the verdict find none.
    The run has all its steps, its checkpoint and its exit code."""
    terminal_side, run_side = os.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", *SMALL, f"run_dir={tmp_path}"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=run_side,
        stdout=run_side,
        stderr=run_side,
    )
    os.close(run_side)
    assert os.read(terminal_side, 9) == b"Triquetra"
    os.close(terminal_side)
    assert run.wait(timeout=240) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("entry", ["trainer.train", "trainer.torchrun --standalone -m trainer.train"])
def test_no_file_of_a_run_is_printed_into(tmp_path, entry, redirection):
    """Pipes, sockets and files that are opened early must not get the numbers of closed descriptors."""
    command = f"{sys.executable} -m {entry} {' '.join(SMALL)} run_dir={tmp_path} {redirection}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-c", command], env=environment, stderr=subprocess.DEVNULL, timeout=400)
    assert done.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_run_writes_nothing_but_what_no_trace_may_be_called(tmp_path):
    assert train.main([*SMALL, f"run_dir={tmp_path}", "logging=tensorboard"]) == 0
    written = {path.name for path in (tmp_path / "run").iterdir()} - {"router.trace"}
    assert {"config.yaml", "metrics.jsonl", "tensorboard"} <= written
    assert [name for name in written if not any(fnmatchcase(name, own) for own in OF_A_RUN)] == []
