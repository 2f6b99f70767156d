"""Where a phase, a source or a row ends: drained or carried, repeated or stopped, cut or fitted. Is every
token accounted for?

Origins of the expected values: ledgers of what was fed in, a slow packer on Python lists, invariance under
ranks, workers and restarts.
"""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.ranks import run_ranks
from tests.runs import run_main
from tests.streams import (
    LENGTHS,
    ListSource,
    arrays,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    numbered,
    open_documents,
    place,
    ragged_sources,
    settings,
    step_rows,
)
from trainer import train
from trainer.config import ConfigError
from trainer.config import load as load_config
from trainer.data import Document, TokenStream
from trainer.model.loss import IGNORE, Groups, linear_cross_entropy
from trainer.program import program_of

# ---- Phases ----------------------------------------------------------------------------------------------


def two_phases(
    *, drain: bool, buffer: int, steps: int = 40, after: int = 6
) -> tuple[TokenStream, list[torch.Tensor]]:
    """From source a to source b after some steps; documents of 100 tokens, of a below 1,000,000."""
    sources = {"a": arrays([100] * 2000), "b": arrays([100] * 2000, first=1_000_000)}
    stream, rows = make_stream(sources, seq_len=64, global_batch=8, num_streams=4), []
    for step in range(steps):
        phase = int(step >= after)
        settings(stream, mixture={"ab"[phase]: 1.0}, buffer=buffer, phase=phase, drain=drain)
        rows.append(step_rows(stream)[0].reshape(4, -1))
    return stream, rows


@pytest.mark.parametrize("buffer", [0, 2, 7])
def test_drained_documents_end_before_the_next_phase_opens_one(buffer: int) -> None:
    _, rows = two_phases(drain=True, buffer=buffer)
    for v in range(4):
        tokens = torch.cat([row[v] for row in rows])
        is_new = tokens >= 1_000_000
        switch = int(is_new.int().argmax())
        # not one token of the old phase after the first of the new
        assert switch >= 6 * 128 and is_new[switch:].all()
        old = Counter((tokens[:switch] // 100).tolist())
        assert set(old.values()) == {100}  # every document that was opened was read to its end


@pytest.mark.parametrize("buffer", [2, 7])
def test_carried_documents_wait_for_their_source_and_none_is_lost(buffer: int) -> None:
    """The mixture is a's, b's, then both's: a switch holds from its first token, and a's documents go on
    where they stopped.
    """
    sources = {"a": arrays([100] * 2000), "b": arrays([100] * 2000, first=1_000_000)}
    stream, rows = make_stream(sources, seq_len=64, global_batch=8, num_streams=4), []
    for step in range(90):
        mixture = {"a": 1.0} if step < 6 else {"b": 1.0} if step < 30 else {"a": 1.0, "b": 1.0}
        settings(stream, mixture=mixture, buffer=buffer, phase=(step >= 6) + (step >= 30))
        rows.append(step_rows(stream)[0].reshape(4, -1))
        if step == 29:
            waiting = {(n, read) for source, n, read in open_documents(stream) if source == 0}
    tokens = torch.stack(rows)
    assert (tokens[:6] < 1_000_000).all() and (tokens[6:30] >= 1_000_000).all() and len(waiting) > 4 * buffer
    for v in range(4):
        read = Counter((tokens[:, v].flatten() // 100).tolist())
        still_open = {
            (10_000 if source else 0) + place(sources["ab"[source]], n, 3): head
            for source, n, head in open_documents(stream)
            if n % 4 == v
        }
        assert all(count == still_open.get(document, 100) for document, count in read.items())
    places = {place(sources["a"], n, 3) for n, _ in waiting}
    assert places & set((tokens[30:] // 100).flatten().tolist())


@pytest.mark.slow
def test_a_drain_that_was_interrupted_goes_on() -> None:
    """Resumed after each step, before, in and after the drain, on other ranks; phases by number, as the
    program counts them.
    """
    straight, state, phases = make_stream(ragged_sources()), None, set()
    for step in range(40):
        streams = [make_stream(ragged_sources(), rank=r, num_ranks=2, workers=step % 2) for r in range(2)]
        if state:
            load(streams, state)
        for stream in [straight, *streams]:
            mixture = {"a": 1.0} if step < 5 else {"b": 1.0, "c": 2.0}
            settings(stream, mixture=mixture, buffer=6, phase=int(step >= 5), drain=True)
        assert torch.equal(global_rows(streams), step_rows(straight))
        state = gathered(streams)
        assert equal(state, straight.state_dict())
        phases.add(tuple(state["phase_V"].tolist()))
        for stream in streams:
            stream.close()
    # some streams drain longer than others
    assert (0,) * 8 in phases and (1,) * 8 in phases and len(phases) > 2


@pytest.mark.parametrize(("mixture", "drain"), [({"a": 3.0, "b": 1.0}, True), ({"b": 1.0}, False)])
def test_what_is_left_of_another_phase_is_charged_to_nobody(mixture: dict[str, float], drain: bool) -> None:
    """One step of 16 tokens into documents of 400: the second step is all of the first phase's documents."""
    sources = {"a": arrays([400] * 64), "b": arrays([400] * 64, first=1_000_000)}
    stream = make_stream(sources, global_batch=8)
    step_rows(stream)
    credits, begun = stream.state_dict()["credit_VS"], {source for source, _, _ in open_documents(stream)}
    settings(stream, mixture=mixture, phase=1, drain=drain)
    step_rows(stream)
    assert begun == {0, 1} and torch.equal(stream.state_dict()["credit_VS"], credits)


# ---- The end of the corpus -------------------------------------------------------------------------------


def read_out(
    streams: list[TokenStream], *, limit: int = 2000, resume_every: int = 0, again=None
) -> list[torch.Tensor]:
    rows = []
    while any(stream.has_more() for stream in streams):
        rows.append(global_rows(streams))
        assert len(rows) < limit
        if resume_every and len(rows) % resume_every == 0:
            state = gathered(streams)
            streams = again(len(rows))
            load(streams, state)
    return rows


@pytest.mark.parametrize("buffer", [0, 3, 64])
@pytest.mark.parametrize("num_sources", [1, 3])
def test_without_repetition_every_token_comes_once_and_then_the_stream_ends(
    buffer: int, num_sources: int
) -> None:
    sources = {name: arrays(LENGTHS[i:] + LENGTHS[:i], first=10_000 * i) for i, name in enumerate("abc")}
    source = sources if num_sources == 3 else sources["a"]
    stream = make_stream(source, at_end="stop", buffer=buffer, seq_len=32)
    rows = read_out([stream])
    tokens, labels, positions = torch.cat(rows, dim=1).flatten(1)
    is_real = positions >= 0
    total = num_sources * sum(LENGTHS)
    fed = sorted(
        token
        for s in list(sources.values())[:num_sources]
        for document in s.documents
        for token in document.tolist()
    )
    assert sorted(tokens[is_real].tolist()) == fed and len(fed) == total
    assert (labels[~is_real] == IGNORE).all() and (tokens[~is_real] == 0).all()
    assert stream.counts == {**stream.counts, "tokens": total, "open": 0, "padding": int((~is_real).sum())}
    # asked again: padding, not another epoch
    assert not stream.has_more() and (step_rows(stream)[2] == -1).all()


def test_the_end_is_the_same_on_any_ranks_and_workers_and_through_resumes() -> None:
    def made(step: int) -> list[TokenStream]:
        num_ranks = (1, 4, 2, 8)[step % 4]
        settings_ = {"at_end": "stop", "buffer": 3, "seq_len": 8, "workers": step % 3}
        return [
            make_stream(ragged_sources(), rank=r, num_ranks=num_ranks, **settings_) for r in range(num_ranks)
        ]

    alone, *others = [read_out(made(step)) for step in range(4)] + [
        read_out(made(0), resume_every=3, again=made)
    ]
    for other in others:
        assert len(alone) == len(other) > 10 and all(
            torch.equal(a, b) for a, b in zip(alone, other, strict=True)
        )


def test_to_ask_whether_there_is_more_changes_nothing() -> None:
    for buffer in (0, 3):
        asked, other = (
            make_stream(ragged_sources(), at_end="stop", buffer=buffer, seq_len=8) for _ in range(2)
        )
        while asked.has_more():
            assert torch.equal(step_rows(asked), step_rows(other)) and equal(
                asked.state_dict(), other.state_dict()
            )


def test_fitted_documents_count_as_much_as_is_kept_of_them() -> None:
    """Documents of 1,000 tokens, cut at 100, and of 10: half of the tokens from each."""
    sources = {"a": arrays([1000] * 400), "b": arrays([10] * 9000, first=1_000_000)}
    stream = make_stream(sources, packing="fit", seq_len=100, global_batch=8, num_streams=2)
    tokens, _, positions = torch.cat([step_rows(stream) for _ in range(100)], dim=1)
    assert (tokens[positions >= 0] < 1_000_000).float().mean().item() == pytest.approx(0.5, abs=0.005)


def test_a_source_at_its_end_leaves_its_share_to_the_others() -> None:
    """1,000, 2,000 and 4,000 tokens at equal weights: a third each until a ends, then halves until b does,
    then c alone.
    """
    lengths = {"a": 10, "b": 20, "c": 40}
    sources = {name: arrays([100] * n, first=10_000 * i) for i, (name, n) in enumerate(lengths.items())}
    rows = read_out([make_stream(sources, at_end="stop", seq_len=50, global_batch=1, num_streams=1)])
    source = (torch.cat(rows, dim=1)[0].flatten() // 10_000)[:7000]

    def shares(tokens: torch.Tensor) -> list[float]:
        return [(tokens == s).float().mean().item() for s in range(3)]

    assert shares(source[:2400]) == pytest.approx([1 / 3] * 3, abs=0.05)
    assert shares(source[3300:4700]) == pytest.approx([0, 1 / 2, 1 / 2], abs=0.05)
    assert shares(source[5300:]) == [0, 0, 1]


def test_a_source_has_its_share_until_its_last_open_document_ends() -> None:
    """The 1,000 tokens of a are open from the start: a third of all until they end. Then nothing is owed to
    it any more.
    """
    sources = {
        name: arrays([100] * n, first=10_000 * i)
        for i, (name, n) in enumerate({"a": 10, "b": 60, "c": 60}.items())
    }
    stream = make_stream(sources, at_end="stop", seq_len=50, global_batch=1, num_streams=1, buffer=60)
    source = torch.cat([step_rows(stream)[0].flatten() // 10_000 for _ in range(54)])  # 2,700
    assert [(source == s).float().mean().item() for s in range(3)] == pytest.approx([1 / 3] * 3, abs=0.05)
    for _ in range(40):
        step_rows(stream)
    assert 0 not in {s for s, _, _ in open_documents(stream)}  # a has ended
    credit_S = stream.state_dict()["credit_VS"][0]
    # less than a document
    assert credit_S.abs().max() < 100 and credit_S.sum().item() == pytest.approx(0, abs=1e-6)


class Ending(ListSource):
    """Read forward, again and again, and its length known once the end was passed."""

    __len__ = None  # not Sized
    num_rows = None

    def seek(self, first: int, *, wanted) -> None:
        self.position, self.kept, self.wanted = first, {}, wanted

    def __getitem__(self, n: int) -> Document:
        while n not in self.kept:
            assert self.position <= n, f"{n} was passed at {self.position} and not kept"
            if self.position >= len(self.documents):
                self.num_rows = len(self.documents)
            if self.position == n or self.wanted(self.position):
                self.kept[self.position] = self.documents[self.position % len(self.documents)]
            self.position += 1
        return Document(f"forward:{n}", tokens=np.array(self.kept.pop(n)))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("num_streams", "buffer"), [(8, 3), (1, 0)])
def test_a_source_that_reads_forward_ends_where_an_indexed_one_does(
    num_streams: int, buffer: int, workers: int
) -> None:
    sizes = {"num_streams": num_streams, "global_batch": num_streams, "buffer": buffer}
    documents, settings_ = numbered(LENGTHS), {"shuffle": False, "at_end": "stop", **sizes}
    indexed = make_stream(ListSource(documents), **settings_)
    forward = make_stream(Ending(documents), workers=workers, **settings_)
    rows, expected = read_out([forward], limit=200), read_out([indexed], limit=200)
    assert len(rows) == len(expected) and all(map(torch.equal, rows, expected))
    assert equal(forward.state_dict(), indexed.state_dict())
    forward.close()


# ---- Whole documents in rows -----------------------------------------------------------------------------


def slow_fit(
    documents: list[list[int]], *, stream: int, num_streams: int, steps: int, num_rows: int, seq_len: int
):
    """Best fit, document by document, token by token: for each step its rows of (token, label, position)."""
    n, found = stream, []
    for _ in range(steps):
        rows = [[] for _ in range(num_rows)]
        while n < len(documents):
            document = documents[n]
            if document:
                cut = document[:seq_len]
                best = None
                for row in rows:
                    if len(row) + len(cut) <= seq_len and (best is None or len(row) > len(best)):
                        best = row
                if best is None:
                    break
                for i, token in enumerate(cut):
                    best.append((token, document[i + 1] if i + 1 < len(document) else -100, i))
            n += num_streams
        found.append([row + [(0, -100, -1)] * (seq_len - len(row)) for row in rows])
    return found


@pytest.mark.parametrize(
    ("num_streams", "global_batch", "seq_len"), [(1, 1, 50), (1, 8, 50), (2, 8, 64), (4, 4, 300)]
)
def test_fitted_rows_are_those_of_the_slow_packer(num_streams: int, global_batch: int, seq_len: int) -> None:
    documents = numbered(np.random.default_rng(0).integers(0, 90, 300).tolist() + LENGTHS)
    sizes = {"num_streams": num_streams, "global_batch": global_batch, "seq_len": seq_len}
    stream = make_stream(ListSource(documents), shuffle=False, packing="fit", at_end="stop", **sizes)
    rows = [step.reshape(3, num_streams, -1, seq_len) for step in read_out([stream])]
    for v in range(num_streams):
        expected = slow_fit(
            documents,
            stream=v,
            num_streams=num_streams,
            steps=len(rows),
            num_rows=global_batch // num_streams,
            seq_len=seq_len,
        )
        assert [step[:, v].permute(1, 2, 0).tolist() for step in rows] == [
            [list(map(list, row)) for row in s] for s in expected
        ]
    kept = sum(min(len(d), seq_len) for d in documents)
    counts = stream.counts
    assert counts["tokens"] == kept and counts["truncated"] == sum(map(len, documents)) - kept
    assert counts["documents"] == sum(map(bool, documents))
    assert counts["padding"] == len(rows) * global_batch * seq_len - kept


def test_fitted_rows_are_the_same_on_any_ranks_and_workers_and_through_resumes() -> None:
    def made(step: int) -> list[TokenStream]:
        num_ranks = (1, 4, 2, 8)[step % 4]
        settings_ = {"packing": "fit", "seq_len": 40, "global_batch": 32, "workers": step % 2}
        return [
            make_stream(ragged_sources(), rank=r, num_ranks=num_ranks, **settings_) for r in range(num_ranks)
        ]

    straight, streams, state = (
        make_stream(ragged_sources(), packing="fit", seq_len=40, global_batch=32),
        made(0),
        None,
    )
    for step in range(8):
        if state:
            streams = made(step)
            load(streams, state)
        assert torch.equal(global_rows(streams), step_rows(straight))
        state = gathered(streams)
        assert equal(state, straight.state_dict())


# ---- Loss by source --------------------------------------------------------------------------------------


def test_sources_of_tokens_are_those_they_were_drawn_from() -> None:
    for packing in ("stream", "fit"):
        sources = {name: arrays([30, 7, 1, 64] * 40, first=100_000 * i) for i, name in enumerate("abc")}
        stream = make_stream(
            sources, with_sources=True, packing=packing, buffer=3 * (packing == "stream"), seq_len=64
        )
        for _ in range(5):
            for tokens, _, positions, source in stream.next_step(4):
                assert torch.equal(source[positions >= 0], (tokens // 100_000)[positions >= 0])


def test_losses_of_groups_are_those_of_their_tokens_alone() -> None:
    """Against torch's cross entropy of each group; chunks that cut groups, two calls that add up, gradients
    untouched.
    """
    random = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(70, 8, generator=random, requires_grad=True),
        torch.randn(2**17, 8, generator=random),
    )
    labels, groups = (
        torch.randint(0, 2**17, (70,), generator=random),
        torch.randint(0, 3, (70,), generator=random),
    )
    labels[::5] = IGNORE
    sums = torch.zeros(2, 4, dtype=torch.float64)
    for _ in range(2):
        loss = linear_cross_entropy(x, weight, labels, groups=Groups(groups, sums))
    for g in range(3):
        expected = F.cross_entropy(
            x[groups == g] @ weight.T, labels[groups == g], ignore_index=IGNORE, reduction="sum"
        )
        assert sums[0, g].item() == pytest.approx(2 * expected.item(), rel=1e-5)
        assert sums[1, g] == 2 * (labels[groups == g] != IGNORE).sum()
    assert sums[:, 3].tolist() == [0, 0]
    [with_groups] = torch.autograd.grad(loss, x)
    [without] = torch.autograd.grad(linear_cross_entropy(x, weight, labels), x)
    assert torch.equal(with_groups, without)


# ---- In a run --------------------------------------------------------------------------------------------

SMALL = [
    "experiment=synthetic",
    "model=debug",
    "model.num_layers=3",
    "model.global_every=3",
    "seq_len=32",
    "global_batch=4",
    "micro_batch=1",
    "guard.enabled=false",
    "data.source.mean_length=40",
]


def metrics(directory) -> list[dict]:
    [path] = directory.glob("*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_ends_with_its_corpus_and_says_so(tmp_path, capfd, num_ranks: int) -> None:
    """40 documents of about 40 tokens make a dozen steps of 128 and more for what some streams pad, not
    100.
    """
    command = [
        *SMALL,
        "steps=100",
        "data.source.num_documents=40",
        "data.at_end=stop",
        "balance=none",
        f"run_dir={tmp_path}",
        f"parallel.dp_shard={num_ranks}",
    ]
    assert set(run_ranks(run_main, num_ranks, command)) <= {train.OK, train.COLLAPSED}
    lines = metrics(tmp_path)
    assert 8 < len(lines) < 40 and lines[-1]["data/documents"] == 40 and lines[-1]["data/open"] == 0
    assert lines[-1]["data/padding"] > 0
    assert f"the corpus is at its end after step {len(lines)} of 100" in capfd.readouterr().out
    # again: nothing is left to do
    assert set(run_ranks(run_main, num_ranks, command)) <= {train.OK, train.COLLAPSED}
    assert metrics(tmp_path) == lines


def test_a_run_logs_the_loss_of_each_source(tmp_path) -> None:
    source = "{_target_: trainer.data.SyntheticSource, vocab_size: 1024, mean_length: 40, seed: %d}"
    command = [
        *SMALL[:-1],
        "steps=3",
        f"run_dir={tmp_path}",
        "data.source=null",
        "data.source_loss=true",
        "parallel.dp_shard=2",
        f"+data.sources.web={source % 1}",
        f"+data.sources.code={source % 2}",
    ]
    run_ranks(run_main, 2, command)
    for line in metrics(tmp_path):
        assert (
            min(line["loss/web"], line["loss/code"])
            <= line["loss"]
            <= max(line["loss/web"], line["loss/code"])
        )
        assert line["loss/web"] != line["loss/code"] and 5 < line["loss"] < 9


def test_data_that_cannot_be_read_ends_a_run_with_its_own_code_and_one_line(tmp_path, capfd) -> None:
    lines = [json.dumps({"text": f"text number {i}, and more of it"}) for i in range(40)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*lines, '{"text": "cut', *lines]))
    command = [
        "experiment=demo",
        *SMALL[1:-1],
        "data=jsonl",
        f"data.source.path={path}",
        "model.vocab_size=300",
        f"data.cache_dir={tmp_path}",
        f"run_dir={tmp_path}",
        "steps=15",
        "data.shuffle=false",
        "data.num_streams=1",
    ]
    assert run_ranks(run_main, 1, [*command, "name=fatal", "data.on_bad=fatal"]) == [train.NO_DATA]
    told = capfd.readouterr().err
    assert "corpus.jsonl:41: broken_json" in told and "data.on_bad=skip" in told and "Traceback" not in told
    assert set(run_ranks(run_main, 1, [*command, "name=skip"])) <= {train.OK, train.COLLAPSED}
    out = capfd.readouterr().out
    assert re.search(r"skipped \d broken_json \(bad_documents", out)
    assert (tmp_path / "skip" / "bad_documents.0.txt").read_text().startswith(f"{path}:41: broken_json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=mixture", "data.at_end=stop", "stage.decay.mixture={modules: 1}"],
            "data.at_end=stop with a mixture that changes",
        ),
        (["data.packing=fit"], r"buffer=1 with data.packing=fit, .*use buffer=0 or data.packing=stream"),
        (
            ["data.packing=fit", "data.buffer=0", "+stage.decay.buffer=4"],
            "stage.decay: buffer=4 with data.packing=fit",
        ),
        (["data.at_end=end"], "data.at_end=end: must be one of repeat, stop"),
        (
            ["data.backend=fast"],
            r"data.backend=fast: must be one of tokenizers, fastokens, gigatoken \(did you mean fastokens",
        ),
        (["data.workers=-1"], "data.workers=-1: must be at least 0"),
        (["data.max_bad=-0.5"], "data.max_bad=-0.5: must be 0 or more"),
    ],
)
def test_ends_that_contradict_each_other_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        program_of(load_config(["experiment=demo", *overrides]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("data.source.path={0}/none", r"^error: data.source: .*none: no file matches; give a file"),
        (
            "data.source.path={0}/in/escape.manifest",
            r"^error: data.source: .*escape.manifest:1: \.\./a.jsonl: leads out of",
        ),
    ],
)
def test_a_source_that_cannot_be_opened_is_named_with_its_key(
    tmp_path, capfd, source: str, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "escape.manifest").write_text("../a.jsonl\n")
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}')
    command = ["experiment=demo", "model=debug", "data=jsonl", source.format(tmp_path), f"run_dir={tmp_path}"]
    assert run_ranks(run_main, 1, command) == [train.REFUSED]
    assert re.search(message, capfd.readouterr().err, re.MULTILINE)
