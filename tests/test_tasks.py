"""Tasks and needles: what a slow loop over single questions gives, and an exact match is what greedy decoding
writes.
"""

import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from trainer import train
from trainer.config import ConfigError, load
from trainer.data import PythonSource, load_tokenizer
from trainer.evaluate import Needles, NeedleSource, Task, harness, measure, packed
from trainer.evaluate.__main__ import main as evaluate
from trainer.evaluate.needles import NEEDLE
from trainer.evaluate.sets import Material
from trainer.evaluate.tasks import answer_example, joined
from trainer.weights.export import main as export

TASKS = Path(__file__).parent / "tasks"
SMALL = [
    *("model=debug", "model.num_layers=4", "model.dim=32", "model.vocab_size=320", "seq_len=64"),
    *("global_batch=4", "micro_batch=1", "steps=2", "data.workers=0", "+data.source.match=json/.*"),
]


def node(name: str, path: Path, **more) -> str:
    rest = "".join(f", {key}: {value}" for key, value in more.items())
    return f"evaluate.{name}={{_target_: trainer.evaluate.Task, path: {path}{rest}}}"


def evaluated(overrides: list[str]) -> dict[str, dict]:
    run = train.start(load(overrides))
    run.evaluations.make(run, list(run.evaluations.named))
    return {result["evaluation"]: result for result in run.evaluations.results}


def scored_one_by_one(overrides: list[str], path: Path) -> dict[str, float]:
    """Each choice alone, as one row, by torch's log_softmax in float64."""
    run = train.build(load(overrides))
    tokenizer, model = run.stream.tokenizer, run.model.eval()
    right = right_per_byte = exact = 0
    nats = tokens = num_bytes = 0.0
    questions = [json.loads(line) for line in path.read_text().splitlines()]
    for question in questions:
        gold, scores = question.get("gold", 0), []
        for choice in question["choices"]:
            whole = tokenizer.encode(question["context"] + choice).ids
            start = len(tokenizer.encode(question["context"].rstrip()).ids)
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]]))[0].double()[start - 1 :]
            labels = torch.tensor(whole[start:])
            likelihood = logits.log_softmax(1).gather(1, labels[:, None]).sum().item()
            is_greedy = torch.equal(logits.argmax(1), labels)
            scores.append((likelihood, likelihood / len(choice.encode()), is_greedy, len(labels)))
        best = max(range(len(scores)), key=lambda n: scores[n][0])
        best_per_byte = max(range(len(scores)), key=lambda n: scores[n][1])
        right, right_per_byte = right + (best == gold), right_per_byte + (best_per_byte == gold)
        exact += scores[gold][2]
        nats, tokens = nats - scores[gold][0], tokens + scores[gold][3]
        num_bytes += len(question["choices"][gold].encode())
    count = len(questions)
    return {
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "loss": nats / tokens,
        "exact": exact / count,
        "accuracy": right / count,
        "accuracy_per_byte": right_per_byte / count,
    }


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_tasks_are_scored_as_choice_by_choice(tmp_path, num_ranks):
    names = ["arithmetic", "brackets", "repeat"]
    tasks = [node(name, TASKS / f"{name}.jsonl") for name in names]
    layout = ["parallel=fsdp_ep"] if num_ranks > 1 else []
    results = run_ranks(evaluated, num_ranks, [*SMALL, *layout, "name=t", f"run_dir={tmp_path}", *tasks])
    for name in names:
        [expected] = run_ranks(
            scored_one_by_one, 1, [*SMALL, "name=o", f"run_dir={tmp_path}"], TASKS / f"{name}.jsonl"
        )
        for of_rank in results:
            result = of_rank[name]
            assert result["questions"] == 40
            for key in expected:
                if key in result:
                    assert result[key] == pytest.approx(expected[key], rel=1e-5), key
            assert ("accuracy" in result) == (name != "repeat")  # a cloze has one choice


def test_white_space_at_the_end_of_a_context_belongs_to_the_choice(tokenizer):
    """As in lm-evaluation-harness, which strips all of it, also ends of lines."""
    for space in (" ", "\n", " \n\t "):
        ids, num_context = joined(tokenizer, f"x = 1{space}", "y")
        assert tokenizer.decode(ids[:num_context]) == "x = 1"
        assert tokenizer.decode(ids[num_context:]) == f"{space}y"


def greedy(overrides: list[str]) -> tuple[list, list]:
    """Six tokens written greedily, one forward pass each, after four prompts; and what is scored of them."""
    run = train.build(load(overrides))
    generator = torch.Generator().manual_seed(0)
    written = []
    run.model.eval()
    for length in (5, 17, 30, 41):
        ids = torch.randint(0, 320, (length,), generator=generator).tolist()
        with torch.no_grad():
            for _ in range(6):
                ids.append(int(run.model(torch.tensor([ids]))[0, -1].argmax()))
        written.append(ids)
    run.model.train()
    return written, scores(run, written)


def scores(run, written: list[list[int]]) -> list[tuple[float, float]]:
    """Hits and targets: of the answers as written, then each with one token changed."""
    changed = [ids.copy() for ids in written]
    for n, ids in enumerate(changed):
        ids[-6 + n] = (ids[-6 + n] + 1) % 320
    examples = [answer_example(ids, 6, group=g, seq_len=64) for g, ids in enumerate(written + changed)]
    sums = measure(run, packed(examples, name="p", seq_len=64, num_groups=8, about={}))
    return list(zip(sums.hits_G.tolist(), sums.targets_G.tolist(), strict=True))


@pytest.mark.slow
def test_an_exact_match_is_what_greedy_decoding_writes(tmp_path):
    overrides = [*SMALL, "name=g", f"run_dir={tmp_path}"]
    [(written, of_one)] = run_ranks(greedy, 1, overrides)
    assert of_one[:4] == [(6.0, 6.0)] * 4
    assert all(hits < 6 and targets == 6 for hits, targets in of_one[4:])
    layout = ["parallel=hsdp_ep"]
    for of_rank in run_ranks(lambda: scores(train.build(load([*overrides, *layout])), written), 4):
        assert of_rank == of_one


# -- needles --


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    source = PythonSource(match="json/.*")
    return load_tokenizer("train", source=source, vocab_size=320, cache_dir=tmp_path_factory.mktemp("cache"))


def material(tokenizer) -> Material:
    return Material(
        name="niah",
        sources={},
        make_source=lambda source: source,
        tokenizer=tokenizer,
        vocab_size=320,
        seq_len=64,
        holdout=0.0,
        max_document_mb=1.0,
    )


@pytest.mark.parametrize("haystack", [None, "prose"])
def test_needles_lie_at_their_depth_and_rows_are_as_long_as_asked(tokenizer, haystack):
    source = PythonSource(match="json/.*") if haystack else None
    needles = Needles(lengths=[600, 1200], depths=[0, 50, 100], samples=3, haystack=source)
    sentences = needles.sentences(material(tokenizer))
    for length in needles.lengths:
        for depth, sample in needles.grid():
            draw = random.Random(f"{needles.seed}/{length}/{depth}/{sample}")
            prompt, answer = needles.question(length, depth, draw, sentences, material(tokenizer))
            text, question = prompt.rsplit("\n", 1)
            key, value = question.rsplit("The number of ", 1)[1].removesuffix(" is"), answer.strip(" .")
            needle = NEEDLE.format(key=key, value=value)
            assert text.count(needle) == 1 and len(value) == 7 and value.isdecimal()
            before, after = text.split(needle)
            assert abs(len(before) / (len(before) + len(after)) - depth / 100) < 0.15
            size = len(tokenizer.encode(prompt + answer).ids)
            assert length * 0.75 < size <= length + 1
    [short, long] = needles.parts(material(tokenizer))
    again = Needles(lengths=[1200], depths=[0, 50, 100], samples=3, haystack=source)
    [same] = again.parts(material(tokenizer))
    assert torch.equal(same.tokens_RL, long.tokens_RL)  # a function of seed, length, depth and sample
    assert short.tokens_RL.shape[1] == 600 and short.num_groups == 9
    targets = [(long.groups_RL[long.labels_RL >= 0] == group).sum().item() for group in range(9)]
    assert min(targets) >= 4 and len(set(targets)) <= 5  # the tokens of " 1234567."


def test_needles_are_counted_by_length_and_depth(tokenizer):
    needles = Needles(lengths=[200, 400], depths=[0, 100], samples=2)
    parts = needles.parts(material(tokenizer))
    of_length = []
    for part, hits in zip(parts, ([5, 5, 5, 4], [0, 5, 4, 4]), strict=True):
        made = {name: torch.zeros(1) for name in ("loss_G", "counts_ME", "tokens_M", "confidence_M")}
        of_length.append(measured(part, torch.tensor(hits), torch.full((4,), 5), made))
    result = needles.result(of_length)
    assert [row["exact"] for row in result["needles"]] == [1.0, 0.5, 0.5, 0.0]
    assert [(row["length"], row["depth"]) for row in result["needles"]] == [
        *((200, 0), (200, 100), (400, 0), (400, 100))
    ]
    assert result["exact"] == 4 / 8 and result["missed"] == 4 / 8
    assert result["exact_at_200"] == 3 / 4 and result["exact_at_400"] == 1 / 4


def bound(tokenizer, **settings) -> NeedleSource:
    source = NeedleSource(**settings)
    source.bind(tokenizer, "train")
    return source


@pytest.mark.parametrize("questions", [1, 4])
def test_documents_about_needles_answer_what_they_hold(tokenizer, questions):
    """By a regular expression over the text of the tokens, and of those that are learned."""
    source = bound(tokenizer, length=800, keys=5, questions=questions)
    pattern = re.compile(r"\nWhat is the number of (.+?)\? The number of \1 is (\d\d)\.")
    for i in range(6):
        tokens, mask = source[i].tokens, source[i].mask
        hay, _, answers = tokenizer.decode(tokens[:-1].tolist()).partition("\n")
        asked = dict(pattern.findall(f"\n{answers}"))
        assert len(asked) == questions and pattern.sub("", f"\n{answers}") == ""
        assert all(hay.count(NEEDLE.format(key=key, value=value)) == 1 for key, value in asked.items())
        assert tokenizer.decode(tokens[mask].tolist()) == answers
        assert tokens[-1] == tokenizer.token_to_id("<|endoftext|>") and 800 - 40 < len(tokens) <= 800
        hard = re.findall(r"The number of \w+ \w+ \d+ is \d\d\.", hay)
        assert bool(hard) == (i % 2 == 0)
        assert (source[i].tokens == bound(tokenizer, length=800, keys=5, questions=questions)[i].tokens).all()
    assert bound(tokenizer, length=800, seed=1)[0].tokens.tolist() != source[0].tokens.tolist()


def test_a_tokenizer_can_be_trained_on_needles_and_what_has_no_room_is_refused(tokenizer):
    assert re.fullmatch(
        r"The number of (\w+ \w+) is (\d\d)\. The number of \w+ \w+ \d+ is \d\d\."
        r"\nWhat is the number of \1\? The number of \1 is \2\.",
        NeedleSource(length=64)[3].text,
    )
    with pytest.raises(ValueError, match=r"length=64 has no room for 5 needles and 5 questions; use \d+ or"):
        bound(tokenizer, length=64, keys=5, questions=5)
    with pytest.raises(ConfigError, match=r"questions=4: there are keys=3; ask for each of them once"):
        NeedleSource(length=64, questions=4)
    with pytest.raises(ValueError, match=r"data.tokenizer=null: needles are text; use data.tokenizer=train"):
        NeedleSource(length=64).bind(None, None)


def measured(part, hits, targets, rest):
    from trainer.evaluate import Measured

    return Measured(part=part, hits_G=hits, targets_G=targets, **rest)


# -- afterwards --


@pytest.mark.slow
def test_checkpoints_and_exports_are_evaluated_afterwards(tmp_path, capsys):
    """Of a run that had no evaluation: kept checkpoints give what an evaluated run found in training."""
    task = node("brackets", TASKS / "brackets.jsonl", interval=1)
    kept = ["checkpoint.interval=1", "checkpoint.keep=9", f"run_dir={tmp_path}", "optim.lr=1e-2"]
    run_ranks(train.main, 1, [*SMALL, *kept, "name=seen", task])
    run_ranks(train.main, 1, [*SMALL, *kept, "name=plain"])
    assert run_ranks(evaluate, 1, [str(tmp_path / "plain"), "all", task]) == [0]
    assert run_ranks(evaluate, 2, [str(tmp_path / "plain"), "2", task, "parallel=fsdp"]) == [0, 0]
    during, after = (
        [json.loads(line) for line in (tmp_path / name / "evaluations.jsonl").read_text().splitlines()]
        for name in ("seen", "plain")
    )
    assert [line["step"] for line in after] == [1, 2] and [line["step"] for line in during] == [0, 1, 2]
    for a, b in zip(during[1:], after, strict=True):
        assert (
            a["bits_per_byte"] == pytest.approx(b["bits_per_byte"], rel=1e-6) and a["tokens"] == b["tokens"]
        )
    assert during[1]["bits_per_byte"] != during[2]["bits_per_byte"]
    assert export([str(tmp_path / "plain"), "2", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    run_ranks(evaluate_into, 1, [str(tmp_path / "out"), task], tmp_path / "told")
    assert f"bits per byte {after[1]['bits_per_byte']:.4g}" in (tmp_path / "told").read_text()


def evaluate_into(words: list[str], path: Path) -> int:
    from contextlib import redirect_stdout

    with path.open("w") as file, redirect_stdout(file):
        return evaluate(words)


# -- what is refused --


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad\.jsonl:2: is no JSON object"),
        ("[1]", r"bad\.jsonl:2: lacks"),
        ('{"context": "a"}', r"bad\.jsonl:2: lacks 'choices'; write one like \{"),
        ('{"context": "a", "choices": []}', r"bad\.jsonl:2: context must be a text and choices a list"),
        (
            '{"context": "a", "choices": [" b", ""]}',
            r"bad\.jsonl:2: choices=.*each must be a text that is not",
        ),
        ('{"context": "a", "choices": [" b"], "gold": 1}', r"bad\.jsonl:2: gold=1: must be .*, 0 to 0"),
        ('{"context": "", "choices": [" b"]}', r"niah: question 2 has no context"),
        (
            json.dumps({"context": "a", "choices": [" bcd" * 80]}),
            r"of question 2 has \d+ tokens and a row 64",
        ),
    ],
)
def test_a_bad_question_is_refused_with_file_and_line(tmp_path, tokenizer, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"context": "a", "choices": [" b"]}\n' + line)
    with pytest.raises(ConfigError, match=message):
        Task(str(path)).parts(material(tokenizer))


def test_files_and_needles_that_cannot_be_are_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"absent\.jsonl: cannot be read \(No such file"):
        Task(str(tmp_path / "absent.jsonl")).parts(material(tokenizer))
    with pytest.raises(ConfigError, match=r"lengths=30 has no room for 4 needles .* use \d+ or more"):
        Needles(lengths=[30]).parts(material(tokenizer))
    with pytest.raises(ConfigError, match=r"depths=\[120\]: give lengths, and depths from 0 to 100"):
        Needles(lengths=[100], depths=[120])
    with pytest.raises(ConfigError, match=r"keys=1000: must be at most 300"):
        Needles(lengths=[100], keys=1000)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harness=mine"], r"needs lm_eval, accelerate: pip install 'triquetra\[harness\]'"),
        (["--harness", "mine", "100"], "has no steps or settings of ours; leave out 100"),
        (["--include-path", "tasks"], "is where --harness=TASK finds tasks of yours; give both"),
        (["--harnes=mine"], "unrecognized arguments: --harnes=mine"),
    ],
)
def test_what_a_harness_needs_is_said_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    """Where the package is not installed, too: here it never is."""
    monkeypatch.setattr(harness, "find_spec", lambda name: None if name != "transformers" else name)
    assert evaluate([str(tmp_path), *words]) == 2
    assert re.search(message, text := capsys.readouterr().err) and len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ([], [], "--harness takes a directory of exported weights; `triquetra export RUN OUT` makes one"),
        (["config.json"], [], "has no tokenizer.json, and the tasks of a harness are text"),
        (
            ["config.json", "tokenizer.json"],
            ["--include-path=absent"],
            r"--include-path=absent: holds no \*\.yaml; give the directory of your tasks",
        ),
    ],
)
def test_what_a_harness_cannot_read_is_refused(tmp_path, monkeypatch, capsys, files, words, message):
    monkeypatch.setattr(harness, "find_spec", lambda name: name)
    for name in files:
        (tmp_path / name).write_text("{}")
    assert evaluate([str(tmp_path), "--harness=mine", *words]) == 2
    assert re.search(message, text := capsys.readouterr().err) and len(text.splitlines()) == 1
