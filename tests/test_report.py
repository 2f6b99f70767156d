"""The report of a run: its numbers are those of the records, whatever state these are in."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records import line, loss_at, write_run
from trainer.lab.page import TEMPLATE
from trainer.lab.report import plots
from trainer.lab.report.__main__ import main
from trainer.lab.report.read import read_records
from trainer.lab.report.summary import tail
from trainer.lab.report.thin import POINTS, Group, differences, groups_of

DOCS = Path(__file__).parent.parent / "docs" / "report.md"
NAN = float("nan")


class Reader(HTMLParser):
    """Texts and tags of a page, and the data in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.words, self.json = set[str](), list[str](), dict[str, str]()
        self.inside, self.id = "", ""
        self.markup = path.read_text(encoding="utf-8")
        self.feed(self.markup)
        self.text = " ".join(self.words)
        self.figures, self.data = (json.loads(self.json[name]) for name in ("figures", "data"))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.inside, self.id = tag, dict(attributes).get("id") or ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.json[self.id] = data
        elif self.inside != "style":
            self.words.append(data)


def small(path: Path, **config) -> Path:
    return write_run(path, steps=config.pop("steps", 40), layers=3, experts=8, **config)


def page_of(*runs: Path, out: Path) -> Reader:
    assert main([*map(str, runs), f"out={out}"]) == 0
    return Reader(out)


def decoded(packed: dict) -> np.ndarray:
    import base64

    return np.frombuffer(base64.b64decode(packed["bdata"]), "<f4")


def add(path: Path, *lines: dict) -> None:
    with path.open("a") as file:
        file.writelines(f"{json.dumps(one)}\n" for one in lines)


# -- what is in the page --


def test_first_the_verdict_then_six_numbers_then_the_curves(tmp_path):
    run = small(tmp_path / "a")
    text = "balance: ok, 0 of 24 experts collapsed, MaxVio 0.42 (floor 0.06)"
    add(run / "verdict.json", {"step": 40, "ok": True, "is_known": True, "text": text})
    text = page_of(run, out=tmp_path / "a.html").text
    order = [
        "a: ok, 0 of 24 experts collapsed",
        "MaxVio 0.42 (floor 0.06)",
        "Validation loss",
        "Tokens per second",
        "Lost",
        "Curves",
        "Gradient norm",
        "Router",
        "Worst layers",
        "Load of every expert",
        "Evaluation: held_out",
        "Starts",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    losses = [json.loads(one)["loss"] for one in (run / "metrics.jsonl").read_text().splitlines()]
    assert f"{np.mean(losses[-4:]):.2f}" in text  # the last tenth of 40 steps
    assert f"{loss_at(40):.2f}" in text


def test_a_verdict_of_an_earlier_end_is_not_that_of_the_run(tmp_path):
    run = small(tmp_path / "a")
    (run / "verdict.json").write_text(
        '{"step": 30, "ok": false, "is_known": true, "text": "balance: FAILED"}\n'
    )
    assert "FAILED" not in page_of(run, out=tmp_path / "a.html").text


def test_an_expert_without_tokens_is_told_before_there_is_a_verdict(tmp_path):
    from trainer.history import ExpertHistory

    run = small(tmp_path / "a")
    (run / "experts.jsonl").unlink()
    history = ExpertHistory(run / "experts.jsonl")
    load_ME = np.ones((3, 8))
    load_ME[1, 5] = 0.05
    for step in range(1, 41):
        history.add(step, load_ME=load_ME, bias_ME=load_ME, gain_M=None)
    history.close()
    assert "1 of 24 experts have less than 10% of their share" in page_of(run, out=tmp_path / "a.html").text


def test_the_page_needs_no_network_and_stays_small(tmp_path):
    reader = page_of(small(tmp_path / "a"), out=tmp_path / "a.html")
    own = TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'" in reader.markup and reader.tags.isdisjoint({"link", "img", "iframe"})
    assert not re.search(r"<script[^>]+src=", own) and (tmp_path / "a.html").stat().st_size < 8e6


def test_lines_are_the_means_of_their_bins(tmp_path):
    """By a slow loop over the file; a run of 1,500 steps has 600 points."""
    run = small(tmp_path / "a", steps=1500)
    group = Group(runs=[read_records(run)])
    values = {
        one["step"]: one["loss"] for one in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    }
    got = group.column("loss")
    assert len(got.mean_P) == POINTS == len(group.edges) - 1
    for start, end, mean, low, high in zip(group.edges, group.edges[1:], *got, strict=False):
        inside = [values[step] for step in range(int(start) + 1, int(end) + 1)]
        assert [mean, low, high] == pytest.approx([np.mean(inside), min(inside), max(inside)])
    reader = page_of(run, out=tmp_path / "a.html")
    assert "Thinned: a point is the mean of up to 3 steps" in reader.text
    shown = next(t for t in reader.figures["figure0"]["data"] if t.get("name") == "loss")
    assert decoded(shown["y"]) == pytest.approx(got.mean_P, rel=1e-6)
    assert decoded(shown["x"]) == pytest.approx(group.edges[1:] * 4096 / 1e6, rel=1e-6)


def test_curves_may_lie_over_tokens_flop_or_steps(tmp_path):
    run = small(tmp_path / "a")
    data = page_of(run, out=tmp_path / "a.html").data
    axes = {name: decoded(x) for name, x in data["axes"]["0"].items()}
    flop = np.cumsum(
        [json.loads(one)["data/step_flop"] for one in (run / "metrics.jsonl").read_text().splitlines()]
    )
    assert list(axes["step"]) == list(range(1, 41))
    assert axes["tokens"] == pytest.approx(np.arange(1, 41) * 4.096)  # thousands
    assert axes["flop"] == pytest.approx(flop / 1e12, rel=1e-6) and set(data["along"]) == {
        "tokens",
        "flop",
        "step",
    }
    spans = data["along"]["step"]["shapes"][0]
    assert (spans["x0"], spans["x1"]) == (pytest.approx(0.8, abs=1e-3), pytest.approx(32))  # of 40 steps


def test_runs_that_differ_in_their_seed_are_one_line_with_a_band(tmp_path):
    runs = [small(tmp_path / f"s{seed}", seed=seed) for seed in range(3)]
    other = small(tmp_path / "other", seed=0, steps=50)
    groups = groups_of([read_records(run) for run in [*runs, other]])
    assert [len(group.runs) for group in groups] == [3, 1]
    losses = np.array(
        [
            [json.loads(one)["loss"] for one in (run / "metrics.jsonl").read_text().splitlines()]
            for run in runs
        ]
    )
    line = groups[0].column("loss")
    assert line.mean_P == pytest.approx(losses.mean(0)) and line.low_P == pytest.approx(losses.min(0))
    assert line.high_P == pytest.approx(losses.max(0))
    assert differences(groups) == {"steps": [40, 50]}
    text = page_of(*runs, other, out=tmp_path / "all.html").text
    assert "s0 and 2 more seeds" in text and "What differs" in text and "4 runs beside each other" in text


def test_evaluations_are_drawn_by_their_shape(tmp_path):
    run = small(tmp_path / "a")
    use = {
        "load": {"web": [[1.0] * 8] * 3, "code": [[0.5] * 8] * 3},
        "confidence": {"web": 0.5, "code": 0.75},
        "specialisation": [0.1, 0.2, 0.3],
        "overlap": {"web | code": 0.625},
    }
    parts = {"web": {"loss": 2.0, "targets": 5}, "code": {"loss": 1.0, "targets": 7}}
    add(
        run / "evaluations.jsonl",
        *(
            {
                "step": s,
                "tokens": s,
                "evaluation": "mine",
                "loss": 3.0 - s,
                "strange_number": 0.5,
                "questions": 12,
                "by_source": parts,
                "by_position": [{"from": 1, "to": 3, "loss": 9.5, "targets": 3}],
                "experts": use,
            }
            for s in (1, 2)
        ),
        *(
            {
                "step": s,
                "tokens": s,
                "evaluation": "hay",
                "exact": 0.5,
                "exact_at_128": 0.5,
                "needles": [
                    {"length": n, "depth": depth, "exact": s / 160 * n / 128, "total": 4}
                    for n in (128, 256)
                    for depth in (0, 50, 100)
                ],
            }
            for s in (20, 40)
        ),
    )
    reader = page_of(run, out=tmp_path / "a.html")
    for words in (
        "Evaluation: mine",
        "2 times so far, on 12 questions",
        "Strange number",
        "Loss by source",
        "1 – 3",
        "9.50",
        "Specialisation of layers",
        "Overlap of domains",
        "Use of experts: web",
        "Evaluation: hay",
        "Needles",
    ):
        assert words in reader.text, words
    needles = next(
        f["data"][0]
        for f in reader.figures.values()
        if f["data"] and f["data"][0].get("y") == ["0 %", "50 %", "100 %"]
    )
    assert decoded(needles["z"]) == pytest.approx([0.25, 0.5] * 3) and needles["z"]["shape"] == "3,2"
    bars = {
        bar["name"]: (bar["x"], decoded(bar["y"]))
        for f in reader.figures.values()
        for bar in f["data"]
        if bar.get("name", "").startswith("step ")
    }
    assert bars == {
        "step 20": (["128", "256"], pytest.approx([0.125, 0.25])),
        "step 40": (["128", "256"], pytest.approx([0.25, 0.5])),
    }
    assert "Needles by length" in reader.text and "Exact at 128" not in reader.text


def test_what_is_wanted_of_a_mixture_stands_beside_what_was_delivered(tmp_path):
    run = small(tmp_path / "a")
    start = json.loads((run / "starts.jsonl").read_text())
    for span in start["program"]:
        span["mixture"] = {"web": 3.0, "code": 1.0}
    (run / "starts.jsonl").write_text(json.dumps(start) + "\n")
    lines = [json.loads(one) for one in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(one | {"data/targets/web": 30, "data/targets/code": 20}) + "\n" for one in lines)
    )
    reader = page_of(run, out=tmp_path / "a.html")
    values = {
        t["name"]: decoded(t["y"])
        for f in reader.figures.values()
        for t in f["data"]
        if "web" in t.get("name", "") or "code" in t.get("name", "")
    }
    expected = {"web": 0.6, "web, wanted": 0.75, "code": 0.4, "code, wanted": 0.25}
    assert values.keys() == expected.keys()
    for name, share in expected.items():
        assert values[name] == pytest.approx([share] * 40), name


def test_starts_changes_roll_backs_alarms_and_bad_documents(tmp_path):
    run = small(tmp_path / "a")
    add(
        run / "starts.jsonl",
        {"step": 20, "tokens": 1, "loaded": "x/step-20", "changed": {"optim.lr": [0.1, 0.2]}, "code": "abc"},
        {"step": 10, "rolled_back": True, "passed_over_steps": 5},
    )
    add(run / "alarms.jsonl", {"step": 7, "text": "step 7: 3 experts starve"})
    (run / "bad_documents.0.txt").write_text("".join(f"data.jsonl:{i}: no text\n" for i in range(30)))
    reader = page_of(run, out=tmp_path / "a.html")
    for words in (
        "optim.lr: 0.1 → 0.2",
        "rolled back, 5 steps of data passed over",
        "0 · 1 · 1",
        "step 7: 3 experts starve",
        "30 were passed over. The first 20",
        "data.jsonl:19: no text",
    ):
        assert words in reader.text, words
    assert "data.jsonl:20" not in reader.text


def test_hostile_text_stays_text(tmp_path):
    evil = "<script>alert(1)</script>"
    run = small(tmp_path / "a", name=evil)
    add(
        run / "evaluations.jsonl",
        {
            "step": 1,
            "evaluation": evil,
            "loss": 1.0,
            "by_" + evil: {evil: {evil: 1.0, "loss": 1.0}},
            "experts": {
                "load": {evil: [[1.0, 1.0]]},
                "confidence": {evil: 1.0},
                "overlap": {f"{evil} | b": 0.5},
            },
        },
    )
    add(run / "alarms.jsonl", {"step": 1, "text": evil})
    add(run / "starts.jsonl", {"step": 1, "changed": {evil: [evil, evil]}, "code": evil, "loaded": evil})
    (run / "bad_documents.0.txt").write_text(evil)
    add(run / "metrics.jsonl", line(41, 4096, 0.0, 3) | {f"loss/{evil}": 1.0})
    other = small(tmp_path / "b", name="b", extra=evil)
    for runs in ([run], [run, other]):
        reader = page_of(*runs, out=tmp_path / "x.html")
        assert evil not in reader.markup and reader.text.count("alert(1)") >= 8
        drawn = json.dumps(reader.figures) + json.dumps(reader.data["along"])
        assert "<script" not in drawn


# -- what is not as it should be --


def test_wrong_input_is_one_line(tmp_path, capsys):
    run = small(tmp_path / "good")
    (tmp_path / "file").write_text("")
    (tmp_path / "none").mkdir()
    for name, text in (("empty", ""), ("broken", "{\nword\n[1]\n{}\n"), ("cut", '{"step": 1, "lo')):
        shutil.copytree(run, tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    shutil.copytree(run, tmp_path / "yaml")
    (tmp_path / "yaml" / "config.yaml").write_text("a: [")
    shutil.copytree(run, tmp_path / "list")
    (tmp_path / "list" / "config.yaml").write_text("[1]")
    wrong = {
        "nothing": "no such directory",
        "file": "no such directory",
        "none": "is no run's directory",
        "empty": "holds no step yet",
        "broken": "none of its 4 lines is a step",
        "cut": "holds no step yet",
        "yaml": "is no YAML",
        "list": "holds no settings",
    }
    for name, words in wrong.items():
        assert main([str(tmp_path / name)]) == 2, name
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, (name, error)
    for arguments, words in (
        (["--fast"], "no such flag"),
        (["out=x"], "which run"),
        ([str(run), f"out={run}"], "out="),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1, error


def test_broken_lines_are_passed_over_and_told(tmp_path, capsys):
    run = small(tmp_path / "a")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[10:10] = ["\x00\x00\n", '{"step": "7"}\n', '{"loss": 1}\n', "1, 2\n"]
    lines.append('{"step": 41, "loss": "word", "grad_norm": ' + "9" * 400 + "}\n")
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 42')
    for name in ("evaluations", "starts", "alarms", "experts"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write("?\n{}\n" if name != "experts" else "?\n")
    records = read_records(run)
    assert list(records.columns.steps_N) == [*range(1, 42)] and np.isnan(records.columns.get("loss")[-1])
    text = page_of(run, out=tmp_path / "a.html").text
    assert "4 lines cannot be read, the first is line 11" in text
    assert "4 lines cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluations.jsonl", "starts.jsonl", "experts.jsonl"])
def test_a_run_from_before_a_file_was_kept_has_a_report(tmp_path, name):
    run = small(tmp_path / "a")
    (run / name).unlink()
    assert "Gradient norm" in page_of(run, out=tmp_path / "a.html").text


def test_results_that_nobody_expects_do_no_harm(tmp_path):
    run = small(tmp_path / "a")
    odd = [
        {},
        [],
        "word",
        None,
        float("nan"),
        [[1], [1, 2]],
        [{"from": 1}],
        {"a": [1, "b"]},
        {"a": {"loss": None}},
    ]
    for value in odd:
        keys = ("loss", "by_part", "experts", "needles", "questions")
        inner = {
            "load": value,
            "confidence": value,
            "specialisation": value,
            "overlap": {"a": value, "a | b": value},
        }
        add(
            run / "evaluations.jsonl",
            {"step": 1, "evaluation": "odd", **dict.fromkeys(keys, value)},
            {"step": 2, "evaluation": "inner", "experts": inner, "needles": [value]},
        )
        add(run / "starts.jsonl", {"step": value, "changed": value, "program": value, "tokens": value})
        add(run / "alarms.jsonl", {"step": value, "text": value})
        page_of(run, out=tmp_path / "a.html")
        page_of(run, small(tmp_path / f"b{odd.index(value)}"), out=tmp_path / "a.html")


def test_a_run_of_one_step_has_a_report(tmp_path):
    assert "Every step is drawn" in page_of(small(tmp_path / "a", steps=1), out=tmp_path / "a.html").text


def test_loads_come_from_the_trace_where_there_is_no_history(tmp_path):
    import torch

    from trainer.balance import RoutingStats
    from trainer.balance.stats import NUM_MARGINS
    from trainer.balance.trace import TraceWriter
    from trainer.lab.report.experts import tail_of

    run = small(tmp_path / "a")
    (run / "experts.jsonl").unlink()
    writer = TraceWriter(run / "router.trace")
    counts_ME = torch.tensor([[30, 10], [20, 20]])
    margins = {
        "margins_MW": torch.ones(2, NUM_MARGINS, dtype=torch.int64),
        "logits_M1": torch.ones(2, 1, dtype=torch.int64),
    }
    for step in range(1, 500):
        writer(step, RoutingStats(counts_ME, 1, torch.zeros(2, 2), **margins))
    writer.lines.close()
    assert tail_of(read_records(run)) == pytest.approx(np.array([[1.5, 0.5], [1.0, 1.0]]))
    assert "From the router trace" in page_of(run, out=tmp_path / "a.html").text


def test_a_mean_over_the_tail_is_that_of_the_last_tenth(tmp_path):
    run = small(tmp_path / "a")
    values = [json.loads(one)["mfu"] for one in (run / "metrics.jsonl").read_text().splitlines()]
    assert tail(read_records(run).columns, "mfu") == pytest.approx(np.mean(values[36:]))
    assert np.isnan(tail(read_records(run).columns, "nothing"))


# -- what is said of it --


def test_the_docs_explain_every_figure():
    text = DOCS.read_text(encoding="utf-8")
    for plot in (plots.LOSS, *plots.RUN, *plots.ROUTER):
        assert f"| {plot.title} |" in text, plot.title
