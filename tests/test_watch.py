"""The live view of a run: the numbers of its records, whatever the terminal can show and the run does."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records import line, write_run
from trainer.lab.report.read import read_records
from trainer.lab.watch.__main__ import main
from trainer.lab.watch.follow import Follower
from trainer.lab.watch.frame import Letters, sparkline


def small(path: Path, steps: int = 40, **config) -> Path:
    return write_run(path, steps=steps, layers=3, experts=8, **config)


def metrics_of(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines(keepends=True)


def test_one_frame_has_the_newest_numbers_and_the_worst_layers(tmp_path, capsys):
    run = small(tmp_path / "a")
    with (run / "alarms.jsonl").open("w") as file:
        file.write('{"step": 3, "text": "step 3: [bold]7 experts starve"}\n')
    assert main([str(run), "--once"]) == 0
    out = capsys.readouterr().out
    last = json.loads(metrics_of(run)[-1])
    assert f"{last['loss']:.2f}" in out and "step 40 of 40" in out and "100%" in out
    assert "worst layers" in out and "held_out" in out and "[bold]7 experts starve" in out
    assert "all 24 experts are alive" in out and max(map(len, out.splitlines())) <= 100


def test_a_sparkline_goes_from_the_least_to_the_largest():
    letters = Letters.of("UTF-8")
    assert sparkline(np.array([0.0, 1, 2, 3, 4, 5, 6, 7]), letters, width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.arange(16.0), letters, width=8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.array([1.0, np.nan, 2.0]), letters, width=9) == "▁ █"
    assert sparkline(np.full(3, np.nan), letters, width=9) == ""
    assert set(sparkline(np.full(3, 7.0), letters, width=9)) == {"▅"}  # one of the two in the middle
    assert sparkline(np.array([0.0, 1.0]), Letters.of("ascii"), width=9) == ".@"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no such directory"),
        (["a", "b"], "2 runs given"),
        (["a", "every=0"], "every=0: must be seconds"),
        (["a", "every=soon"], "every=soon"),
        (["a", "--twice"], "no such flag"),
        (["--once"], "0 runs given"),
    ],
)
def test_wrong_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


def test_a_run_without_a_step_has_no_frame_yet(tmp_path, capsys):
    run = small(tmp_path / "a")
    (run / "metrics.jsonl").write_text("")
    assert main([str(run), "--once"]) == 2
    assert "no step yet" in capsys.readouterr().err
    assert Follower(run).poll() is None


def test_it_reads_on_where_it_was_and_anew_where_the_run_went_back(tmp_path):
    """At every moment the columns are those of a reader that begins anew."""
    run = small(tmp_path / "a")
    lines = metrics_of(run)
    path, follower = run / "metrics.jsonl", Follower(run)

    def check(text):
        path.write_text(text)
        got = follower.poll()
        expected = read_records(run).columns.values
        assert got.columns.values.keys() == expected.keys()
        for name, x in expected.items():
            np.testing.assert_array_equal(got.columns.values[name], x, err_msg=name)

    later = [json.dumps(line(step, 4096, 0.5, 3) | {"new": 1.0}) + "\n" for step in range(21, 60)]
    check("".join(lines[:10]))
    check("".join(lines[:11]) + lines[11][:30])  # half of a line
    check("".join(lines[:30]))
    check("".join(lines[:20]))  # the run was killed and resumes from step 20
    check("".join(lines[:20] + later[:5]))
    check("".join(lines[:20] + later))
    check("".join(lines[:10] + later[:1] + lines[10:]))  # longer than before, and something else


def test_of_a_long_run_it_reads_the_end(tmp_path, monkeypatch):
    from trainer.lab.watch import follow

    run = small(tmp_path / "a", steps=100)
    monkeypatch.setattr(follow, "MOST_READ", 3 * len(metrics_of(run)[-1]))
    steps = Follower(run).poll().columns.steps_N
    assert steps[-1] == 100 and 2 <= len(steps) <= 3


class Terminal:
    """`triquetra watch` on a terminal of its own."""

    def __init__(self, run: Path, **environment: str):
        self.leader, follower = pty.openpty()
        program = [sys.executable, "-m", "trainer", "watch", str(run), "every=0.1"]
        env = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
        env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
        self.process = subprocess.Popen(program, stdin=follower, stdout=follower, stderr=follower, env=env)
        os.close(follower)
        self.seen = ""

    def wait_for(self, words: str) -> str:
        """What was printed up to these words. Raises: AssertionError if the program ends without them."""
        while words not in self.seen:
            try:
                self.seen += os.read(self.leader, 65536).decode(errors="replace")
            except OSError:
                raise AssertionError(self.seen) from None
        return self.seen

    def rest(self) -> tuple[int, str]:
        """Its exit code, and all that it printed."""
        try:
            while data := os.read(self.leader, 65536):
                self.seen += data.decode(errors="replace")
        except OSError:
            pass
        os.close(self.leader)
        return self.process.wait(), self.seen


def going_on(tmp_path: Path) -> Path:
    run = small(tmp_path / "a")
    (run / "metrics.jsonl").write_text("".join(metrics_of(run)[:20]))
    return run


def test_ctrl_c_ends_it_cleanly(tmp_path):
    terminal = Terminal(going_on(tmp_path))
    terminal.wait_for("step 20 of 40")
    terminal.process.send_signal(signal.SIGINT)
    code, seen = terminal.rest()
    assert code == 0 and "Traceback" not in seen and "\x1b[" in seen
    assert seen.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_it_follows_a_run_that_goes_on_and_ends_with_it(tmp_path):
    run = going_on(tmp_path)
    whole = "".join(json.dumps(line(step, 4096, 0.1, 3)) + "\n" for step in range(1, 41))
    terminal = Terminal(run)
    terminal.wait_for("step 20 of 40")
    (run / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:10]))
    terminal.wait_for("step 10 of 40")
    (run / "metrics.jsonl").write_text(whole)
    code, seen = terminal.rest()
    assert code == 0 and "step 40 of 40" in seen


@pytest.mark.parametrize(("environment", "has_codes"), [({"NO_COLOR": "1"}, True), ({"TERM": "dumb"}, False)])
def test_terminals_without_colour(tmp_path, environment, has_codes):
    """NO_COLOR: the cursor moves, but no colour is set. A dumb terminal gets plain lines."""
    import re

    run = small(tmp_path / "a")
    code, seen = Terminal(run, **environment).rest()
    assert code == 0 and "40" in seen and ("\x1b[" in seen) == has_codes
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|38|9[0-7])[0-9;]*m", seen)
