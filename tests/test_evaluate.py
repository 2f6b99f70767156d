"""Evaluation: numbers that an independent reading gives, the same on any layout, and a training that does not
notice.

The oracle predicts each document alone, as one unpacked row, and sums with torch's own cross entropy.
"""

import json
import math
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from tests.ranks import run_ranks
from trainer import train
from trainer.checkpoint import read_whole
from trainer.config import ConfigError, load
from trainer.data import IGNORED, JsonlSource, is_held_out
from trainer.data.sources import Document
from trainer.evaluate import Example, packed
from trainer.evaluate.experts import overlap, specialisation
from trainer.evaluate.rows import share_of
from trainer.evaluate.sets import example, held_out, in_order

SMALL = [
    *("model=debug", "model.num_layers=2", "model.global_every=2", "model.dim=32", "model.vocab_size=320"),
    *("seq_len=32", "global_batch=4", "micro_batch=1", "steps=6", "data.workers=0", "optim.lr=1e-2"),
    *("data=jsonl", "data.source.field=text", "checkpoint.interval=3", "checkpoint.keep=9"),
]
WORDS = [
    "router",
    "expert",
    "token",
    "bias",
    "load",
    "share",
    "gate",
    "step",
    "batch",
    "rank",
    "loss",
    "norm",
    "head",
    "layer",
    "mask",
    "row",
]
LAYOUTS = {2: ["parallel=fsdp"], 4: ["parallel=hsdp_ep"]}


def text(i: int) -> str:
    generator = torch.Generator().manual_seed(i)
    length = 3 + i % 40
    picks = torch.randint(len(WORDS), (length,), generator=generator).tolist()
    return " ".join(WORDS[pick] for pick in picks) + (" é ü → 你好" if i % 3 == 0 else "")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    for name, numbers in (("train", range(300)), ("other", range(1000, 1060))):
        lines = [json.dumps({"text": text(i)}) for i in numbers]
        (directory / f"{name}.jsonl").write_text("\n".join(lines))
    return directory


def settings(corpus: Path, directory: Path, *more: str) -> list[str]:
    return [*SMALL, f"data.source.path={corpus}/train.jsonl", f"run_dir={directory}", *more]


def validation(corpus: Path, **arguments) -> str:
    source = f"{{_target_: trainer.data.JsonlSource, path: {corpus}/other.jsonl, field: text}}"
    more = "".join(f", {key}: {value}" for key, value in arguments.items())
    return f"evaluate.other={{_target_: trainer.evaluate.Validation, source: {source}{more}}}"


def results(directory: Path) -> list[dict]:
    lines = map(json.loads, (directory / "evaluations.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def metrics(directory: Path) -> list[dict]:
    timed = ("tokens_per_s", "mfu", "memory_gib", "data/wait_s")
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


# -- which documents --


def test_a_document_is_held_out_by_its_content_alone(corpus, tmp_path):
    """Its copy is on the same side; more files and another order change nothing; the share is as wished."""
    texts = [f"document {i}" for i in range(20_000)]
    sides = [is_held_out(Document(f"a:{i}", text=line), share=0.1) for i, line in enumerate(texts)]
    again = [is_held_out(Document(f"b:{i}", text=line), share=0.1) for i, line in enumerate(texts)]
    assert sides == again
    assert abs(sum(sides) - 2000) < 3 * math.sqrt(20_000 * 0.1 * 0.9)  # 3 deviations of a binomial
    wider = [is_held_out(Document("", text=line), share=0.2) for line in texts]
    assert all(b for a, b in zip(sides, wider, strict=True) if a)  # a larger share holds out these, and more
    before = [document.text for document in held_out(JsonlSource(f"{corpus}/train.jsonl", "text"), 0.1)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text(i)}) for i in range(2000, 2100)))
    (tmp_path / "b.jsonl").write_text((corpus / "train.jsonl").read_text())
    after = [document.text for document in held_out(JsonlSource(str(tmp_path), "text"), 0.1)]
    assert after[-len(before) :] == before and len(before) > 10


@pytest.mark.parametrize("workers", [0, 1])
def test_no_held_out_document_is_ever_in_a_training_row(corpus, tmp_path, workers):
    """An oracle reads all rows of more than an epoch, finds every other document, and none of these."""

    def rows() -> tuple[list[int], dict, str]:
        overrides = settings(corpus, tmp_path, "name=r", "data.holdout=0.2", f"data.workers={workers}")
        run = train.build(load(overrides))
        run.stream.set(seq_len=4096, global_batch=4, mixture=None, buffer=0)
        tokens = torch.cat([b.tokens_BL.flatten() for _ in range(4) for b in run.stream.next_step(1)])
        run.stream.close()
        return tokens.tolist(), run.stream.counts, run.stream.tokenizer.to_str()

    [(ids, counts, tokenizer)] = run_ranks(rows, 1)
    delivered = set(
        Tokenizer.from_str(tokenizer).decode(ids, skip_special_tokens=False).split("<|endoftext|>")
    )
    source = list(in_order(JsonlSource(f"{corpus}/train.jsonl", "text")))
    out = {document.text for document in source if is_held_out(document, share=0.2)}
    assert counts["epoch"] >= 1 and counts["held_out"] >= len(out) > 30
    assert not out & delivered
    assert {document.text for document in source} - out <= delivered


# -- rows --


def test_rows_hold_every_example_once_and_its_labels_are_its_next_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (50,), generator=generator).tolist()
    tokens = [torch.randint(1, 99, (n,), generator=generator) for n in lengths]
    examples = [Example(t, torch.where(torch.arange(len(t)) % 3 == 0, -1, 5)) for t in tokens]
    part = packed(examples, name="p", seq_len=16, num_groups=6, about={})
    pieces = []
    for row in zip(*(plane.tolist() for plane in part.planes), strict=True):
        for token, label, position, group in zip(*row, strict=True):
            if position == 0:
                pieces.append([])
            if position >= 0:
                pieces[-1].append((token, label, group))
            else:
                assert (token, label) == (0, IGNORED)
    expected = [
        [(a, b if group else IGNORED, group) for a, b, group in places_of(t.tolist())]
        for t in tokens
        if len(t) > 1
    ]
    assert sorted(pieces) == sorted(expected)
    shares = [share_of(part, reader=r, num_readers=3, micro_batch=2) for r in range(3)]
    assert len({len(batches) for batches in shares}) == 1  # equally many forward passes on each rank
    rows = sorted(row for batches in shares for b in batches for row in b[0].tolist() if any(row))
    assert rows == sorted(part.tokens_RL.tolist())


def places_of(tokens: list[int]) -> list[tuple[int, int, int]]:
    """Token, next token and its group (0: it is no label) of each place of a document, cut at 16."""
    pairs = pairwise(tokens[:17])
    return [(a, b, 5 if place % 3 else 0) for place, (a, b) in enumerate(pairs, start=1)]


def test_masked_tokens_of_a_document_are_no_targets():
    tokens, mask = np.arange(10, 20, dtype=np.uint32), np.arange(10) % 3 != 0
    one = example(tokens, torch.from_numpy(mask))
    part = packed([one], name="p", seq_len=12, num_groups=4, about={})
    expected = [int(token) if kept else IGNORED for token, kept in zip(tokens[1:], mask[1:], strict=True)]
    assert part.labels_RL[0, :9].tolist() == expected


# -- numbers --


def oracle(corpus: Path, directory: Path) -> dict:
    """What `Validation` must say before the first step, document by document. On one rank."""
    run = train.build(load(settings(corpus, directory, "name=oracle")))
    tokenizer, model = run.stream.tokenizer, run.model.eval()
    loss = torch.zeros(6, dtype=torch.float64)
    targets, hits, num_bytes = torch.zeros(6), 0, 0
    for i in range(1000, 1060):
        ids = [*tokenizer.encode(text(i)).ids, 0][:33]
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0].double()
        labels = torch.tensor(ids[1:])
        nats = F.cross_entropy(logits, labels, reduction="none")
        hits += int((logits.argmax(1) == labels).sum())
        for position, value in enumerate(nats, start=1):
            loss[int(math.log2(position))] += value
            targets[int(math.log2(position))] += 1
        spelled = ids[1:-1] if ids[-1] == 0 else ids[1:]
        whole, rest = (b"".join(map(token_bytes(tokenizer), part)) for part in (ids, spelled))
        assert text(i).encode().startswith(whole.removesuffix(b"<|endoftext|>"))
        num_bytes += len(rest)
    return {"loss_G": loss, "targets_G": targets, "hits": hits, "bytes": num_bytes}


def token_bytes(tokenizer: Tokenizer):
    """Byte-level BPE writes each byte as one letter (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in letters)}
    byte_of = {letter: byte for byte, letter in letters.items()}
    return lambda i: bytes(byte_of[letter] for letter in tokenizer.id_to_token(i))


def evaluated(overrides: list[str]) -> list[dict]:
    """The results of the evaluations that are due before the first step."""
    run = train.start(load(overrides))
    run.evaluations.make(run, run.evaluations.due(run, at_start=True))
    return run.evaluations.results


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("alone")
    overrides = settings(corpus, directory, "name=a", validation(corpus))
    [[result]] = run_ranks(evaluated, 1, overrides)
    return result


def test_loss_hits_bits_per_byte_and_positions_are_those_of_documents_alone(corpus, tmp_path, alone):
    [expected] = run_ranks(oracle, 1, corpus, tmp_path)
    num_targets, loss = int(expected["targets_G"].sum()), expected["loss_G"].sum().item()
    assert alone["targets"] == num_targets and alone["documents"] == 60
    assert alone["accuracy"] * num_targets == pytest.approx(expected["hits"])
    assert alone["loss"] == pytest.approx(loss / num_targets, rel=1e-6)
    assert alone["perplexity"] == pytest.approx(math.exp(loss / num_targets), rel=1e-5)
    # offsets of `tokenizers` are letters: where a token ends inside one, its bytes count with the next
    assert alone["bits_per_byte"] == pytest.approx(loss / math.log(2) / expected["bytes"], rel=2e-3)
    assert [row["targets"] for row in alone["by_position"]] == expected["targets_G"].int().tolist()
    for row, loss, targets in zip(
        alone["by_position"], expected["loss_G"], expected["targets_G"], strict=True
    ):
        assert row["loss"] == pytest.approx((loss / targets).item(), rel=1e-5)
    assert [(row["from"], row["to"]) for row in alone["by_position"]][:3] == [(1, 1), (2, 3), (4, 7)]


@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [
        (1, ["micro_batch=4"]),
        (2, LAYOUTS[2]),
        pytest.param(4, LAYOUTS[4], marks=pytest.mark.slow),
        pytest.param(4, ["parallel=fsdp_ep"], marks=pytest.mark.slow),
        (4, ["parallel.cp=2", "parallel.dp_shard=2", "parallel.ep=4"]),
    ],
)
def test_results_are_the_same_on_any_layout(corpus, tmp_path, alone, num_ranks, more):
    overrides = settings(corpus, tmp_path, "name=a", validation(corpus), *more)
    for [result] in run_ranks(evaluated, num_ranks, overrides):
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert result["accuracy"] == alone["accuracy"] and result["targets"] == alone["targets"]
        assert result["experts"]["load"] == alone["experts"]["load"]
        assert result["experts"]["confidence"]["other"] == pytest.approx(
            alone["experts"]["confidence"]["other"], rel=1e-5
        )


def test_specialisation_and_overlap_by_hand():
    """Two domains. Layer 0: the same expert; layer 1: different ones; layer 2: (1/2, 1/2) and (1, 0).

    Layer 2: the mean is (3/4, 1/4) with entropy 0.8113 bits; the domains have 1 and 0 bits, 1/2 on the mean.
    """
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    torch.testing.assert_close(
        specialisation(torch.stack([a, b])), torch.tensor([0.0, 1.0, mixed - 0.5], dtype=torch.float64)
    )
    assert overlap(a, b).tolist() == [1.0, 0.0, 0.5]


# -- training does not notice --


def trained(overrides: list[str], stop_at: int | None = None) -> int:
    step = train.train_step

    def stopping_step(run, batches, **timing):
        if run.step + 1 == stop_at:
            run.stop.signalled = signal.SIGINT
        return step(run, batches, **timing)

    train.train_step = stopping_step
    return train.train(load(overrides))


@pytest.mark.parametrize(
    ("num_ranks", "layout"), [(1, []), pytest.param(4, LAYOUTS[4], marks=pytest.mark.rare)]
)
def test_a_run_that_is_evaluated_is_the_run_that_is_not(corpus, tmp_path, num_ranks, layout):
    """Bit for bit: metrics and every tensor of the last checkpoint; also where it stopped and went on."""
    evaluate = [
        validation(corpus, interval=2),
    ]
    run_ranks(trained, num_ranks, settings(corpus, tmp_path, "name=plain", *layout))
    run_ranks(trained, num_ranks, settings(corpus, tmp_path, "name=seen", *evaluate, *layout))
    stopped = settings(corpus, tmp_path, "name=halves", *evaluate, *layout)
    run_ranks(trained, num_ranks, stopped, 4)
    run_ranks(trained, num_ranks, stopped)
    plain = read_whole(tmp_path / "plain/checkpoints/step-00000006")
    for name in ("seen", "halves"):
        assert metrics(tmp_path / name) == metrics(tmp_path / "plain")
        state = read_whole(tmp_path / name / "checkpoints/step-00000006")
        assert state.keys() == plain.keys() and all(torch.equal(state[key], plain[key]) for key in plain)
    assert [line["step"] for line in results(tmp_path / "seen")] == [0, 2, 4, 6]
    assert results(tmp_path / "halves") == results(tmp_path / "seen")
    losses = [line["loss"] for line in results(tmp_path / "seen")]
    assert losses == sorted(losses, reverse=True) and losses[0] - losses[-1] > 0.05  # it learns
    assert not (tmp_path / "plain" / "evaluations.jsonl").exists()


def interrupted(overrides: list[str], at_step: int) -> int:
    """The last rank is told to end in an evaluation, at its second microbatch."""
    from trainer.evaluate import kernel

    ask = kernel.is_told_to_stop

    def asked(run):
        is_last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        if run.step == at_step and is_last:
            run.stop.signalled = signal.SIGTERM
        return ask(run)

    kernel.is_told_to_stop = asked
    return train.main(overrides)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_in_an_evaluation_saves_the_step_and_leaves(corpus, tmp_path, num_ranks):
    """The same command goes on, makes the evaluation that was broken off, and ends as the undisturbed run."""
    layout = LAYOUTS.get(num_ranks, [])
    evaluate = [validation(corpus, interval=2), *layout]
    run_ranks(trained, num_ranks, settings(corpus, tmp_path, "name=whole", *evaluate))
    overrides = settings(corpus, tmp_path, "name=told", *evaluate)
    assert set(run_ranks(interrupted, num_ranks, overrides, 2)) == {75}
    assert [line["step"] for line in results(tmp_path / "told")] == [0]
    assert (tmp_path / "told/checkpoints/latest").read_text().strip() == "step-00000002"
    run_ranks(trained, num_ranks, overrides)
    assert results(tmp_path / "told") == results(tmp_path / "whole")
    assert metrics(tmp_path / "told") == metrics(tmp_path / "whole")


def test_a_signal_before_the_first_step_ends_without_a_checkpoint(corpus, tmp_path):
    overrides = settings(corpus, tmp_path, "name=told", validation(corpus))
    assert run_ranks(interrupted, 1, overrides, 0) == [75]
    assert not list((tmp_path / "told/checkpoints").glob("step-*"))


# -- the best checkpoint --


def test_the_best_checkpoint_stays(corpus, tmp_path):
    """Results are made up: the best one is of step 2, where no interval would save."""

    def worker() -> int:
        from trainer.evaluate.sets import Validation

        losses = iter([9.0, 5.0, 7.0, 6.0])
        Validation.result = lambda self, measured: {"loss": next(losses)}
        best = ["checkpoint.keep_best=other", "checkpoint.keep=1", validation(corpus, interval=2)]
        return train.train(load([*settings(corpus, tmp_path, "name=best"), *best]))

    run_ranks(worker, 1)
    kept = sorted(path.name for path in (tmp_path / "best/checkpoints").glob("step-*"))
    assert kept == ["step-00000002", "step-00000006"]


# -- what is refused --


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["evaluate=held_out"], r"evaluate\.held_out: data\.holdout=0\.0 holds no document out; use data\.h"),
        (
            ["evaluate=held_out", "data.holdout=1e-9"],
            r"data\.holdout=1e-09 of held_out: there is no document",
        ),
        (
            ["evaluate=held_out", "data.holdout=0.7"],
            r"data\.holdout=0\.7: must be at most 0\.5 \(the rest is",
        ),
        (["evaluate.x={interval: 3}"], r"evaluate\.x=.*: must be an evaluation, like \{_target_"),
        (["evaluate.x={_target_: trainer.evaluate.HeldOut, intervall: 3}"], r"did you mean interval"),
        (
            ["evaluate.x={_target_: trainer.evaluate.HeldOut, interval: 0}"],
            r"evaluate\.x: interval=0: must be",
        ),
        (["evaluate.x={_target_: trainer.evaluate.Validation}"], r"evaluate\.x: give either source or"),
        (
            ["checkpoint.keep_best=x"],
            r"checkpoint\.keep_best=x: is no evaluation of this run \(there are: no",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(corpus, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        run_ranks(evaluated, 1, settings(corpus, tmp_path, "name=no", *change))
    assert not (tmp_path / "no" / "starts.jsonl").exists()


def test_a_set_that_is_trained_on_is_refused_and_shared_documents_are_told(corpus, tmp_path, caplog):
    """The whole corpus again; and a set in which one of sixty documents is a copy."""
    source = f"{{_target_: trainer.data.JsonlSource, path: {corpus}/train.jsonl, field: text}}"
    same = f"evaluate.x={{_target_: trainer.evaluate.Validation, source: {source}}}"
    with pytest.raises(ConfigError, match=r"evaluate\.x\.source: is the corpus of data\.source; use another"):
        run_ranks(evaluated, 2, settings(corpus, tmp_path, "name=no", "parallel=fsdp", same))
    lines = (corpus / "other.jsonl").read_text().splitlines()
    (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, json.dumps({"text": text(7)})]))
    source = f"{{_target_: trainer.data.JsonlSource, path: {tmp_path}/mixed.jsonl, field: text}}"
    mixed = f"evaluate.x={{_target_: trainer.evaluate.Validation, source: {source}}}"

    def warned() -> list[str]:
        evaluated(settings(corpus, tmp_path, "name=mixed", mixed))
        return [record.getMessage() for record in caplog.records]

    [messages] = run_ranks(warned, 1)
    assert any(
        "evaluate.x.source shares 1 documents with the first 20000 of data.source" in m for m in messages
    )


def test_a_set_that_one_rank_cannot_read_ends_all_of_them_in_one_line(corpus, tmp_path):
    source = f"{{_target_: trainer.data.TextSource, path: {tmp_path}/absent}}"
    node = f"evaluate.x={{_target_: trainer.evaluate.Validation, source: {source}}}"
    with pytest.raises(ConfigError, match=r"^evaluate\.x: .*absent: no file matches"):
        run_ranks(evaluated, 2, settings(corpus, tmp_path, "name=no", "parallel=fsdp", node))
