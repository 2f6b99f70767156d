"""simulation.html shows what simulation.json says, alone, in both themes, whatever the arms are called."""

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.lab.page import NUM_COLOURS, TEMPLATE, Cell, Column, Page, number, typed
from trainer.lab.simulate.page import write_page
from trainer.lab.simulate.result import CURVES, METRICS

STEPS = [2, 4, 6, 8]
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Reader(HTMLParser):
    """Tags with their attributes, visible text, scripts by id (or position); complains of tags that do not
    match.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text, self.styles, self.scripts = [], [], [], {}
        self.open: list[tuple[str, dict]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attrs = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[attrs.get("id", len(self.scripts))] = data
        elif tag == "style":
            self.styles.append(data)
        elif data.strip():
            self.text.append(data.strip())

    def json(self, name: str) -> Any:
        return json.loads(self.scripts[name])


def run(arm: str, seed: int = 0, *, collapsed: int = 0, loads: bool = True) -> dict:
    data = base64.b64encode(np.arange(2 * 3 * 4, dtype=np.uint8).tobytes()).decode()
    curve = [1.0 + seed, 0.5, None, 0.25]
    return {
        "arm": arm,
        "seed": seed,
        "ok": not collapsed,
        "collapsed": collapsed,
        "seconds": 1.0,
        "summary": {"steps_to_balance": 40 + seed, "excess_mean": 0.125, "recovery_steps": None},
        "steps": STEPS,
        "curves": {"max_violation": curve, "bias_step_rms": curve, "min_load": curve, "floor": [0.1] * 4},
        "loads": {"layers": 2, "experts": 3, "bins": 4, "max": 4.0, "data": data} if loads else None,
    }


def result(*runs: dict, shift_step: int | None = 4, **other) -> dict:
    config = {
        "level": "frozen",
        "scores": "topics",
        "layers": 2,
        "experts": 3,
        "steps": 8,
        "shift_step": shift_step,
    }
    return {
        "format": "triquetra-simulation",
        "version": 1,
        "command": "triquetra simulate name=a",
        "torch": "2.13.0",
        "seconds": 1.5,
        "config": config,
        "notes": ["open loop: a note"],
        "runs": list(runs),
        "ranking": None,
        "thresholds": {"max_excess": 1.0},
        "failures": [],
        **other,
    }


@pytest.fixture
def page(tmp_path: Path):
    def write(value: dict) -> Reader:
        write_page(value, tmp_path / "simulation.html")
        return Reader(tmp_path / "simulation.html")

    return write


def rows(reader: Reader) -> list[str]:
    """Texts of the page from the first table's head on."""
    return reader.text[reader.text.index("Arm") :]


def test_page_holds_the_result_and_says_the_verdict(page) -> None:
    value = result(run("smebu"), run("none", collapsed=2), failures=["none seed 0: 2 of 6 experts collapsed"])
    reader = page(value)
    assert reader.json("data") == value
    said = ["1 of 2 arms passed", "✓ passed", "✗ collapsed (2 experts)"]
    for text in [*said, *value["failures"], *value["notes"], value["command"]]:
        assert text in reader.text
    assert any("max excess 1" in text for text in reader.text)
    missed = page(result(run("smebu"), failures=["smebu seed 0: excess_mean is 2, the limit is 1"]))
    assert "smebu missed a threshold" in missed.text
    long = page(result(run("smebu"), failures=[f"failure {i}" for i in range(9)])).text
    assert "and 3 more" in long
    assert "failure 8" in long
    assert "smebu passed" in page(result(run("smebu"))).text


def test_page_loads_nothing(page) -> None:
    reader = page(result(run("smebu"), run("none")))
    assert [
        tag
        for tag, attrs in reader.tags
        if tag in ("link", "img", "iframe") or {"src", "href"} & attrs.keys()
    ] == []
    assert not re.search(r"url\(|@import", "".join(reader.styles))
    [policy] = [
        attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    template = TEMPLATE.read_text(encoding="utf-8")
    assert "http:" not in template
    assert "https:" not in template
    assert "showSendToCloud: false" in template  # a button of plotly.js


def test_hostile_text_stays_text(page) -> None:
    name, note = "</script><b>x", "<img src=x onerror=alert(1)>&amp;"
    value = result(run(name), run("b"), notes=[note], failures=[note], command=note)
    value["config"]["</dt>"] = "</title><script>"
    reader = page(value)
    assert reader.json("data") == value
    assert {tag for tag, _ in reader.tags}.isdisjoint({"b", "img"})
    assert reader.text.count(note) == 3
    assert name in reader.text
    names = {trace.get("name") for trace in reader.json("figures")["figure0"]["data"]}
    assert "&lt;/script&gt;&lt;b&gt;x" in names  # plotly reads some tags in names


def test_null_is_never(page) -> None:
    texts = rows(page(result(run("a"), run("b"))))
    assert texts.count("never") == 2
    value = run("a")
    value["summary"] = dict.fromkeys(METRICS)
    value["curves"] = {key: [None] * len(STEPS) for key in CURVES}
    value["loads"] = None
    reader = page(result(value))
    assert rows(reader).count("never") == len(METRICS)
    assert "Curves over steps" not in reader.text
    assert "Load of every expert" not in reader.text


def test_without_a_shift_there_is_no_recovery(page) -> None:
    reader = page(result(run("a"), shift_step=None))
    assert "Recovery" not in reader.text
    assert "never" not in reader.text
    assert not [s for s in reader.json("figures")["figure0"]["layout"]["shapes"] if s.get("x0") == 4]
    reader = page(result(run("a")))
    assert [s for s in reader.json("figures")["figure0"]["layout"]["shapes"] if s.get("x0") == 4]


def test_lines_are_means_in_bands_in_the_colour_of_the_arm(page) -> None:
    reader = page(result(run("a"), run("a", 1, loads=False), run("b")))
    traces = reader.json("figures")["figure0"]["data"]
    low, high, mean, other, floor = [np.frombuffer(base64.b64decode(t["y"]["bdata"]), "<f4") for t in traces]
    np.testing.assert_equal(low, np.float32([1, 0.5, np.nan, 0.25]))
    np.testing.assert_equal(high, np.float32([2, 0.5, np.nan, 0.25]))
    np.testing.assert_equal(mean, np.float32([1.5, 0.5, np.nan, 0.25]))
    np.testing.assert_equal(other, low)
    np.testing.assert_equal(floor, np.float32([0.1] * 4))
    assert [traces[2]["line"]["color"], traces[3]["line"]["color"]] == ["var(--c0)", "var(--c1)"]
    assert traces[4]["line"]["dash"] == "dash"
    dots = [
        re.search(r"var\(--c\d+\)", attrs["style"])[0]
        for _, attrs in reader.tags
        if attrs.get("class") == "dot"
    ]
    assert dots[:2] == ["var(--c0)", "var(--c1)"]
    assert set(dots) == {"var(--c0)", "var(--c1)"}


def test_ranking_shows_intervals_and_shades_the_best_that_passed(page) -> None:
    def ranked(arm: str, rank: int, mean: float | None) -> dict:
        metric = (
            {"mean": mean, "low": 0.11, "high": 0.13} if mean else {"mean": None, "low": None, "high": None}
        )
        return {
            "arm": arm,
            "rank": rank,
            "num_seeds": 2,
            "collapsed_runs": 0,
            "metrics": {"excess_mean": metric},
        }

    runs = [run(arm, seed, collapsed=2 * (arm == "none")) for arm in ("a", "b", "none") for seed in (0, 1)]
    value = result(*runs, ranking=[ranked("b", 1, 0.12), ranked("a", 2, 0.3), ranked("none", 3, 0.05)])
    reader = page(value)
    texts = rows(reader)
    assert texts.index("b") < texts.index("a") < texts.index("none")
    assert texts[texts.index("0.120") + 1] == "[0.110, 0.130]"
    assert "✗ collapsed in 2 of 2 seeds (2 experts)" in texts
    best = [attrs["data-sort"] for tag, attrs in reader.tags if tag == "td" and "best" in attrs["class"]]
    assert best[0] == "0.12"  # not 0.05, which collapsed
    assert "Every run" in texts
    value["ranking"][0] = ranked("b", 1, None)
    assert "never" in rows(page(value))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["ranking"], "it has no ranking"),
        (["runs", 0, "curves"], r"runs\[0\] has no curves"),
        (["runs", 1, "summary"], r"runs\[1\] has no summary"),
        (["runs", 0, "loads", "max"], r"runs\[0\].loads has no max"),
        (["runs", 0, "curves", "floor", 0], r"runs\[0\].curves.floor: 3 values, 4 steps"),
    ],
)
def test_missing_parts_are_named(where: list, message: str, tmp_path: Path) -> None:
    value = copy.deepcopy(result(run("a"), run("b")))
    inner: Any = value
    for key in where[:-1]:
        inner = inner[key]
    del inner[where[-1]]
    with pytest.raises(ValueError, match=message):
        write_page(value, tmp_path / "page.html")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"runs": []}, "no runs"),
        ({"seconds": float("inf")}, "write null for a number that is not finite"),
        ({"runs": [run("a"), run("a", 1) | {"steps": [1, 2, 3, 4]}]}, r"runs\[1\] has other steps"),
        (
            {
                "runs": [
                    run("a") | {"loads": {"layers": 2, "experts": 3, "bins": 5, "max": 4, "data": "AAAA"}}
                ]
            },
            "3 bytes, .* is 30",
        ),
        (
            {"ranking": [{"arm": "b", "rank": 1, "num_seeds": 1, "collapsed_runs": 0, "metrics": {}}]},
            "no run has the arm b",
        ),
    ],
)
def test_broken_results_are_refused(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_page(result(run("a")) | change, tmp_path / "page.html")


def test_both_themes_have_every_colour(tmp_path: Path) -> None:
    style = TEMPLATE.read_text(encoding="utf-8").split("</style>")[0]
    light, dark = (
        dict(re.findall(r"(--\w+): (#\w{6})\b", block))
        for block in re.findall(r":root \{(.*?)\n\}", style, re.S)
    )
    assert light.keys() == dark.keys()
    for theme in (light, dark):
        assert len({theme[f"--c{i}"] for i in range(NUM_COLOURS)}) == NUM_COLOURS
    write_page(result(run("a"), run("b")), tmp_path / "page.html")
    assert (
        set(re.findall(r"var\((--\w+)\)", (tmp_path / "page.html").read_text(encoding="utf-8")))
        <= light.keys()
    )


def test_a_page_of_ones_own(tmp_path: Path) -> None:
    page = Page("A title")
    page.section("Schedule", "What it is.")
    page.facts({"steps": 3})
    page.table(
        [Column("name", text=True), Column("rate", "1/s", "how fast")],
        [[Cell("a", value="a"), Cell("1", value=1)]],
    )
    page.figure([{"x": typed([1, 2]), "y": typed([1, None])}], title="Rate", unit="1/s")
    page.write(tmp_path / "own.html", data={"{{title}}": 1})
    reader = Reader(tmp_path / "own.html")
    assert reader.text[0] == "A title"
    assert reader.json("data") == {"{{title}}": 1}  # a slot's name in a value is not filled
    assert {"title": "how fast", "scope": "col"} in [attrs for tag, attrs in reader.tags if tag == "th"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (4.0, "4"),
        (1234, "1,234"),
        (0.1251, "0.125"),
        (1.0, "1"),
        (0.9996, "1"),
        (31.27, "31.3"),
        (9.7e-5, "9.7e-5"),
        (-0.5, "-0.500"),
        (2.5e12, "2.5e12"),
        (None, "–"),
        (float("nan"), "–"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text
