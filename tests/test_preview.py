"""What a person sees before a run: the table in the terminal, the page, and what is refused."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.lab.preview import __main__ as preview
from trainer.lab.preview.table import human, short
from trainer.program import program_of
from trainer.size import count_parameters, flops_per_token

# a tenth of 200 steps warms up, a fifth decays
DEMO = ["experiment=demo", "optim=adamw", "optim.lr=2e-3", "data=synthetic"]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """The command, in this process: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["preview", *arguments])
        code = preview.main()
        return code, *capsys.readouterr()

    return run


def cells(text: str) -> list[list[str]]:
    """Of the lines between the head's rule and the empty line below the table."""
    body = re.search(r"─ *\n(.*?)\n\s*\n", text, re.DOTALL)[1]
    return [re.split(r"\s{2,}", line.strip()) for line in body.splitlines()]


def figures(path: Path) -> dict[str, dict]:
    """Of a page, by the title above each."""
    html = path.read_text(encoding="utf-8")
    found = json.loads(
        re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.DOTALL)[1]
    )
    titles = re.findall(r"<h3>(.*?)</h3><p></p><div id=\"(\w+)\"", html)
    return {re.sub("<.*?>", "", title): found[name] for title, name in titles}


def numbers(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(packed["bdata"]), dtype="<f4")


def test_numbers_as_a_person_writes_them():
    counts = {
        0: "0",
        16: "16",
        999: "999",
        1000: "1K",
        819200: "819.2K",
        999_999: "1M",
        4.9e12: "4.9T",
        11.05e12: "11.05T",
        13.37e9: "13.37B",
    }
    assert {count: human(count) for count in counts} == counts
    values = {
        0: "0",
        1: "1",
        12288: "12,288",
        0.25: "0.25",
        8e-4: "8e-4",
        7.61e-4: "7.61e-4",
        1e-6: "1e-6",
        1.584e24: "1.58e24",
        33.02: "33",
        0.388: "0.388",
        1234.5: "1.23e3",
    }
    assert {value: short(value) for value in values} == values


def test_trinity_large_as_a_command(tmp_path):
    arguments = ["experiment=trinity_large", "tokens_per_s=6e6", f"out={tmp_path}/new/large.html"]
    command = [sys.executable, "-m", "trainer.lab.preview", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    rows = cells(done.stdout)
    # 2000 x 12288 x 8192 tokens are 201.3B; at 6e6 tokens/s they take 0.388 days
    assert rows[0][:8] == [
        "warmup",
        "1",
        "2,000",
        "0 - 201.3B",
        "12,288 x 8,192",
        "2",
        "0 → 8e-4",
        "0 → 2e-4",
    ]
    assert "0.388" in rows[0]
    # (4.9T - 201.3B) / (12288 x 8192) = 46677.3 steps
    by_span = {row[0]: row for row in rows}
    assert by_span["phase1"] == [
        "phase1",
        "2,001",
        "46,678",
        "201.3B - 4.9T",
        "12,288 x 8,192",
        "2",
        "8e-4",
        "2e-4",
        "9.06",
    ]
    assert by_span["phase1_larger_batch"][4:] == [
        "16,384 x 8,192",
        "2",
        "8e-4",
        "2e-4",
        "micro_batch 4 · z_loss_weight 1e-6",
        "9.84",
    ]
    assert by_span["phase3"][-4:] == ["2.91e-4 → 8e-5", "7.28e-5 → 2e-5", "buffer 4,096", "4.92"]
    last = done.stdout.splitlines()[-2]
    size = "parameters 398.6B · active 13.37B"
    assert (
        last
        == f"In all: tokens 17T · steps 138,830 · {size} · days 32.8 · training FLOP 1.55e24 · ranks 2,048"
    )
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/new/large.html: the page"
    html = (tmp_path / "new" / "large.html").read_text(encoding="utf-8")
    # without plotly itself
    own = re.sub(r"<script>(?!\s*\"use strict\").*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"https?://|<link|<img|src=", own)
    assert "prefers-color-scheme: dark" in own
    for text in ("17T tokens in 138,830 steps, 32.8 days", "z_loss_weight 1e-6", "16,384 x 8,192"):
        assert text in own


def test_page_draws_the_curves_of_the_program(call):
    code, out, _ = call("experiment=trinity_large_extension", "out=large.html")
    assert code == 0
    extension = next(row for row in cells(out) if row[0] == "extension")
    # 117e9 / (512 x 262,144) = 871.7 steps
    columns = ["138,831", "872", "17T - 17.12T", "512 x 262,144", "1", "8e-5 → 4e-5", "2e-5 → 1e-5"]
    assert extension[1:8] == columns
    drawn = figures(Path("large.html"))
    assert list(drawn) == [
        "Learning rates",
        "Global batch [M tokens]",
        "Global batch [sequences]",
        "Sequence length [tokens]",
        "micro_batch",
        "z_loss_weight",
        "buffer",
    ]
    muon, adamw = drawn["Learning rates"]["data"]
    assert (muon["name"], adamw["name"]) == ("optim.lr", "optim.adamw_lr")
    x, y = numbers(muon["x"]), numbers(muon["y"])
    # [T], by hand
    at = {0.1007: 4e-4, 1: 8e-4, 10: 8e-4, 13.5: 0.55 * 8e-4, 17: 8e-5, 17.0585: 6e-5, 17.117: 4e-5}
    np.testing.assert_allclose(np.interp(list(at), x, y), list(at.values()), rtol=2e-3)
    np.testing.assert_allclose(numbers(adamw["y"]), y / 4, rtol=1e-6)
    assert len(x) > 1000
    labels = [note["text"] for note in drawn["Learning rates"]["layout"]["annotations"]]
    assert labels == [
        "warmup",
        "phase1",
        "phase1_larger_batch",
        "phase1_anneal",
        "phase2",
        "phase3",
        "extension",
    ]
    bands = drawn["Learning rates"]["layout"]["shapes"]
    assert [(round(band["x0"], 2), round(band["x1"], 2)) for band in bands] == [
        (0.2, 4.9),
        (10, 11.05),
        (14.45, 17),
    ]
    assert set(numbers(drawn["Global batch [sequences]"]["data"][0]["y"])) == {12288, 16384, 512}
    assert set(numbers(drawn["Sequence length [tokens]"]["data"][0]["y"])) == {8192, 262144}
    tokens = sorted(set(numbers(drawn["Global batch [M tokens]"]["data"][0]["y"])))
    np.testing.assert_allclose(tokens, [100.663296, 134.217728], rtol=1e-6)
    batch = drawn["Global batch [sequences]"]["data"][0]
    jump = numbers(batch["x"])[numbers(batch["y"]) == 16384][0]
    assert jump == pytest.approx(4.9, abs=1e-3)


def test_demo_by_hand(call):
    changed = [
        "stage.stable.mixture={web:0.7,code:0.3}",
        "stage.decay.bias_rate={to:0.1,shape:cosine}",
        "stage.decay.micro_batch=1",
    ]
    code, out, _ = call(*DEMO, "ranks=2", *changed)
    assert code == 0
    rows = cells(out)
    assert [row[1:6] for row in rows] == [
        ["1", "20", "0 - 81.92K", "16 x 256", "2"],
        ["21", "140", "81.92K - 655.4K", "16 x 256", "2"],
        ["161", "40", "655.4K - 819.2K", "16 x 256", "8"],
    ]
    assert [row[6] for row in rows] == ["0 → 2e-3", "2e-3", "2e-3 → 0"]
    assert [row[7] for row in rows] == [
        "micro_batch 4 · sequence_loss_weight 1e-4 · buffer 1",
        "mixture web 0.7, code 0.3",
        "micro_batch 1 · bias_rate 1 → 0.1",
    ]
    model = preview.load(DEMO).model
    count, flop = count_parameters(model), 200 * 16 * 256 * flops_per_token(model, seq_len=256)
    assert (
        f"parameters {human(count.total)} · active {human(count.active)} · training FLOP {short(flop)} "
        "· ranks 2"
    ) in out
    assert "days" not in out.lower()
    assert out.splitlines()[-1] == "runs/demo/preview.html: the page"
    drawn = figures(Path("runs/demo/preview.html"))
    web, code = drawn["mixture [weights of the sources]"]["data"]
    assert (web["name"], code["name"]) == ("web", "code")
    values = numbers(web["y"])
    assert np.isnan(values[0])  # no mixture yet: a gap
    assert values[-1] == pytest.approx(0.7)
    rate = drawn["bias_rate"]["data"][0]
    x, y = numbers(rate["x"]), numbers(rate["y"])
    np.testing.assert_allclose(np.interp([300, 737.28, 819.2], x, y), [1, 0.55, 0.1], rtol=1e-3)
    assert set(numbers(drawn["micro_batch"]["data"][0]["y"])) == {4, 1}


def test_flop_and_days_are_sums_over_spans(call):
    """decay: half the batch, twice the length: 40 steps of 16 x 512 tokens at other FLOP per token."""
    code, out, _ = call(*DEMO, "stage.decay.seq_len=512", "tokens_per_s=100")
    assert code == 0
    model = preview.load(DEMO).model
    short_rows, long_rows = 160 * 16 * 256, 40 * 16 * 512
    flop = short_rows * flops_per_token(model, seq_len=256) + long_rows * flops_per_token(model, seq_len=512)
    assert f"training FLOP {short(flop)}" in out
    days = [row[-1] for row in cells(out)]
    assert days == [short(tokens / 100 / 86400) for tokens in (20 * 4096, 140 * 4096, long_rows)]
    assert f"days {short((short_rows + long_rows) / 100 / 86400)}" in out


def test_steps_cut_the_preview_short(call):
    stage = ["stage=trinity_nano", "micro_batch=1", "global_batch=4096", "seq_len=4096"]
    code, out, _ = call(*DEMO, *stage, "steps=3000")
    assert code == 0
    assert [row[:3] for row in cells(out)] == [["warmup", "1", "2,000"], ["phase1", "2,001", "1,000"]]
    assert "steps 3,000" in out
    code, out, _ = call(*DEMO, *stage, "steps=1000")
    assert [row[:3] for row in cells(out)] == [["warmup", "1", "1,000"]]
    assert "0 → 1e-3" in out  # the cut ends half-way up to 2e-3


def test_a_narrow_terminal_gets_all_columns_below_each_other(call, monkeypatch):
    wide = call("experiment=trinity_nano", "tokens_per_s=5e6")[1]
    monkeypatch.setenv("COLUMNS", "80")
    narrow = call("experiment=trinity_nano", "tokens_per_s=5e6")[1]
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("extension_warmup ") == 3
    assert "…" not in narrow
    words = [word for row in cells(wide) for word in row if "·" not in word]
    assert [word for word in words if word not in narrow] == []


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ranks=0", "ranks=0: must be a whole number, at least 1; without it, parallel= gives 1"),
        ("ranks=-1", "ranks=-1: must be a whole number"),
        ("ranks=abc", "ranks=abc: must be a whole number"),
        ("ranks=2.5", "ranks=2.5: must be a whole number"),
        ("ranks=", "ranks=: must be a whole number"),
        (
            "ranks=3",
            "global_batch=16 sequences do not divide among 3 data-parallel ranks; use global_batch=15 or 18",
        ),
        (
            "tokens_per_s=-1",
            "tokens_per_s=-1: must be a number above 0, like 6e6, at least 0.001; without it",
        ),
        *(
            (f"tokens_per_s={value}", f"tokens_per_s={value}: must be a number above 0")
            for value in ("0", "x", "nan", "inf", "", "1e-320")
        ),
        ("tokens_per_sec=5", "tokens_per_sec: there is no such key (did you mean tokens_per_s?)"),
        ("rank=4", "rank: there is no such key (did you mean ranks?)"),
        ("out=", "out=.: Is a directory; give a file that can be written, like out=preview.html"),
        ("out=/proc/self/status/x.html", "out=/proc/self/status/x.html: File exists; give"),
        ("stpes=5", "did you mean steps"),
        ("stage.decay.lr.to=-1", "stage.decay: lr.to=-1: must be a number, 0 or more"),
        ("experiment=nope", "demo"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(call, argument, message):
    code, _, err = call(*DEMO, argument)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_ranks_are_those_of_the_configuration_unless_given(call):
    def ranks(*arguments: str) -> str:
        return re.search(r"ranks (\S+)", call(*DEMO, *arguments)[1])[1]

    assert ranks() == "1"
    assert ranks("parallel.dp_replicate=2", "parallel.dp_shard=4", "micro_batch=2") == "8"
    assert ranks("parallel=hsdp") == "2"  # dp_replicate alone: dp_shard is what the ranks leave
    assert ranks("parallel=hsdp", "ranks=4") == "4"
    assert ranks("parallel.dp_shard=2", "parallel.cp=4") == "8"  # 2 readers of 16 rows, in microbatches of 8
    assert "  1  " in next(
        line
        for line in call(*DEMO, "parallel.dp_shard=2", "parallel.cp=4")[1].splitlines()
        if "warmup" in line
    )


def test_the_extension_of_trinity_large_needs_no_row_for_each_rank(call):
    """512 rows of 256K tokens on 2,048 GPUs: each row on 4 of them (arXiv:2602.17004, section 4)."""
    code, out, _ = call("experiment=trinity_large_extension", "tokens_per_s=4e6")
    assert code == 0 and "ranks 2,048" in out
    [line] = [line for line in out.splitlines() if line.strip().startswith("extension")]
    assert re.search(r"512 x 262,144 +1 ", line)
    code, _, error = call("experiment=trinity_large_extension", "ranks=510")
    assert code == 2 and error.startswith(
        "error: parallel.cp=4 does not divide ranks=510; use one of [1, 2, 3, "
    )


def test_help_and_configuration(call):
    code, out, _ = call("--help")
    assert code == 0
    assert "tokens_per_s" in out
    assert re.search(r"stage= +constant \| cosine", out)
    code, out, _ = call(*DEMO, "ranks=7", "--cfg", "job")
    assert code == 0
    assert "global_batch: 16" in out
    assert "ranks" not in out


def test_a_run_may_begin_in_the_directory_of_its_preview(call):
    """Only preview.html is there: nothing that a run would take for a run's."""
    assert call(*DEMO)[0] == 0
    assert [path.name for path in Path("runs/demo").iterdir()] == ["preview.html"]


def test_stretches_cover_the_program():
    program = program_of(preview.load(DEMO))
    found = preview.stretches(program)
    assert [(s.first_step, s.num_steps) for s in found] == [(1, 20), (21, 140), (161, 40)]
    assert [s.end for s in found[:-1]] == [s.start for s in found[1:]]
    assert found[-1].end == 200 * 16 * 256


@pytest.mark.slow
def test_what_torch_says_of_the_planner_s_process_group_is_not_shown(tmp_path):
    command = [sys.executable, "-m", "trainer.lab.preview", "experiment=demo", "model=debug", "device=h200"]
    done = subprocess.run([*command, f"out={tmp_path}/p.html"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
