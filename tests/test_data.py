"""Are the rows the documents: every token once, in a known order, on any number of ranks, after any restart?

Origins of the expected values: `reference_rows` (a slow packer on Python lists), a ledger over what was fed
in, invariance under the number of ranks and under restarts, and other readers (readlines, pyarrow, json).
"""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test may need the network

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer

from tests.corpora import outcome
from tests.streams import (
    LENGTHS,
    ListSource,
    TextListSource,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    numbered,
    ranks,
    step_rows,
    write_lines,
)
from trainer import data
from trainer.data import BadDocument, TokenStream

# ---- Corpora and the slow reference ----------------------------------------------------------------------


def cursor_of(stream: TokenStream) -> torch.Tensor:
    """Document and tokens read of it, for each of a rank's streams: one source, no buffer. (V, 2)"""
    state = stream.state_dict()
    number_V, is_open_VC = torch.tensor(stream.streams), state["index_VC"] >= 0
    assert (is_open_VC.sum(1) <= 1).all()
    n_VC = number_V[:, None] + state["index_VC"] * stream.num_streams
    n_V = torch.where(is_open_VC.any(1), (n_VC * is_open_VC).sum(1), state["next_VS"][:, 0])
    return torch.stack([n_V, (state["read_VC"] * is_open_VC).sum(1)], dim=1)


def reference_rows(documents: list[list[int]], *, stream: int, num_streams: int, num_rows: int, seq_len: int):
    """The first rows of one stream over an unshuffled corpus, token by token: [(token, label, position)]."""
    rows, row, n = [], [], stream
    while len(rows) < num_rows:
        document, start = documents[n % len(documents)], 0
        for i, token in enumerate(document):
            label = document[i + 1] if i + 1 < len(document) else -100
            row.append((token, label, i - start))
            if len(row) == seq_len:
                rows.append(row)
                row, start = [], i + 1
        n += num_streams
    return rows[:num_rows]


# ---- Rows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seq_len", "num_streams"), [(16, 4), (16, 1), (1, 2), (7, 8), (100, 2)])
def test_rows_are_those_of_the_slow_packer(seq_len: int, num_streams: int) -> None:
    documents = numbered(LENGTHS)
    sizes = {"seq_len": seq_len, "num_streams": num_streams, "global_batch": 8}
    stream = make_stream(ListSource(documents), shuffle=False, **sizes)
    num_steps, per_step = 6, 8 // num_streams
    steps = [step_rows(stream, micro_batch=4) for _ in range(num_steps)]
    for v in range(num_streams):
        sizes = {"num_streams": num_streams, "num_rows": num_steps * per_step, "seq_len": seq_len}
        expected = reference_rows(documents, stream=v, **sizes)
        got = torch.cat([rows[:, v * per_step : (v + 1) * per_step] for rows in steps], dim=1)
        assert got.permute(1, 2, 0).tolist() == [[list(place) for place in row] for row in expected]


def test_batches_are_int64_microbatches_of_the_right_shape() -> None:
    batches = make_stream(ListSource(numbered(LENGTHS))).next_step(4)
    fields = [(field.shape, field.dtype) for batch in batches for field in batch]
    assert fields == [((4, 16), torch.int64)] * 12


def first_epoch(source: ListSource, **changes: object) -> list[list[tuple[int, int]]]:
    """(token, label) of each document that the streams delivered in epoch 0, cut where a label is -100."""
    num_streams, num_documents = 8, len(source)
    stream = make_stream(source, **changes)
    delivered: list[list] = [[[]] for _ in range(num_streams)]
    while int(cursor_of(stream)[:, 0].min()) < num_documents + num_streams:
        tokens, labels, _ = step_rows(stream).reshape(3, num_streams, -1)
        for v in range(num_streams):
            for pair in zip(tokens[v].tolist(), labels[v].tolist(), strict=True):
                delivered[v][-1].append(pair)
                if pair[1] == -100:
                    delivered[v].append([])
    shares = [len(range(v, num_documents, num_streams)) for v in range(num_streams)]
    return [document for v in range(num_streams) for document in delivered[v][: shares[v]]]


def test_ledger_of_an_epoch_every_token_once_and_every_pair_once() -> None:
    documents = [document for document in numbered(LENGTHS) if document]
    delivered = first_epoch(ListSource(documents))
    inputs = Counter(token for document in delivered for token, _ in document)
    assert inputs == Counter(token for document in documents for token in document)
    trained = Counter(pair for document in delivered for pair in document if pair[1] != -100)
    assert trained == Counter(pair for document in documents for pair in pairwise(document))


def test_labels_never_cross_documents() -> None:
    """Tokens are the document's number: a label is its own number or -100, and no document lacks its end."""
    documents = [[i] * length for i, length in enumerate(LENGTHS, start=1) if length]
    stream = make_stream(ListSource(documents))
    for _ in range(20):
        tokens, labels, positions = step_rows(stream)
        assert ((labels == tokens) | (labels == -100)).all()
        changes = tokens[:, 1:] != tokens[:, :-1]
        assert (labels[:, :-1][changes] == -100).all()
        assert (positions[:, 1:][changes] == 0).all()
        assert (positions[:, 0] == 0).all()


def test_each_epoch_has_its_own_permutation_of_the_corpus() -> None:
    keys = [(0, 0), (0, 1), (1, 0)]
    orders = [data.permutation(1000, seed=seed, epoch=epoch).tolist() for seed, epoch in keys]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    for one, other in pairwise([*orders, orders[0]]):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected: independent orders
    assert orders[0] == data.permutation(1000, seed=0, epoch=0).tolist()


# ---- Elastic and exact -----------------------------------------------------------------------------------


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    source = ListSource(numbered(LENGTHS))
    by_ranks = {num_ranks: ranks(num_ranks, source) for num_ranks in (1, 2, 4, 8)}
    for _ in range(12):  # 3072 tokens: several epochs of 749
        alone, *others = [global_rows(streams) for streams in by_ranks.values()]
        assert all(torch.equal(alone, rows) for rows in others)


def test_ranks_are_disjoint_over_an_epoch() -> None:
    streams = ranks(4, ListSource(numbered([40] * 64)))
    seen = [set(torch.cat([step_rows(stream)[0] for _ in range(4)]).flatten().tolist()) for stream in streams]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 4 * 16 * 16  # steps x rows x L, none seen twice


def test_resumes_in_the_middle_of_a_document_twice_in_a_row() -> None:
    source = ListSource(numbered(LENGTHS))
    straight = make_stream(source)
    expected = [step_rows(straight) for _ in range(9)]
    resumed = make_stream(source)
    for step, rows in enumerate(expected):
        if step in (3, 4, 7):
            state = resumed.state_dict()
            assert (cursor_of(resumed)[:, 1] > 0).any()  # it is the middle of a document
            resumed = make_stream(source)
            for _ in range(2):
                resumed.load_state_dict(state, keep_counts=True)
            assert equal(resumed.state_dict(), state)
        assert torch.equal(step_rows(resumed), rows)
    assert resumed.counts == straight.counts


def test_a_stream_in_use_goes_back_to_a_state_as_often_as_wanted() -> None:
    stream = make_stream(ListSource(numbered(LENGTHS)))
    step_rows(stream)
    state = stream.state_dict()
    expected = [step_rows(stream) for _ in range(3)]
    for _ in range(2):
        stream.load_state_dict(state, keep_counts=True)
        assert all(torch.equal(step_rows(stream), rows) for rows in expected)


def test_chain_of_2_8_4_1_ranks_equals_one_run() -> None:
    source = ListSource(numbered(LENGTHS))
    straight, state = make_stream(source), None
    for num_ranks in (2, 8, 4, 1):
        streams = ranks(num_ranks, source)
        if state:
            load(streams, state)
        for _ in range(3):
            assert torch.equal(global_rows(streams), step_rows(straight))
        state = gathered(streams)
    assert equal(state, straight.state_dict())  # also the counts of the empty ones, each once


def test_counts_are_what_was_read() -> None:
    stream = make_stream(ListSource([[1, 2, 3, 4]] * 6), num_streams=2, global_batch=2)
    for _ in range(3):
        step_rows(stream)
    # 3 steps x 2 rows x 16 tokens = 96 tokens = 24 documents = 4 epochs of 6
    expected = {
        "epoch": 4,
        "documents": 24,
        "tokens": 96,
        **dict.fromkeys(("open", "padding", "truncated", *data.BAD_KINDS, "held_out", "not_drawn"), 0),
    }
    assert stream.counts == expected
    open_17 = {"index_VC": torch.tensor([[-2], [8]]), "read_VC": torch.tensor([[0], [1]])}  # 17 = 1 + 8 * 2
    state = {**stream.state_dict(), **open_17, "next_VS": torch.tensor([[30], [19]])}
    stream.load_state_dict(state, keep_counts=False)
    assert stream.counts == {**dict.fromkeys(expected, 0), "epoch": 17 // 6}  # that of the slowest stream


def test_foreign_states_are_refused() -> None:
    streams = ranks(2, ListSource(numbered(LENGTHS)))
    with pytest.raises(ValueError, match="not that of streams 0 to 3 of this run"):
        streams[0].load_state_dict(streams[1].state_dict(), keep_counts=True)
    with pytest.raises(ValueError, match=r"8 streams, this run 4; use data.num_streams=8"):
        make_stream(ListSource([[1]]), num_streams=4).load_state_dict(gathered(streams), keep_counts=True)
    long, short = make_stream(ListSource([[1] * 100])), make_stream(ListSource([[1] * 3]))
    step_rows(long)
    short.load_state_dict(long.state_dict(), keep_counts=True)
    with pytest.raises(ValueError, match="corpus and the tokenizer of the checkpoint"):
        step_rows(short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_streams": 6}, r"num_streams=6 must divide global_batch=16 .*from \[1, 2, 4, 8, 16\]"),
        ({"num_streams": 2, "num_ranks": 4}, r"num_streams=2 .* of the 4 data-.*from \[4, 8, 16\]"),
        ({"num_ranks": 3}, r"num_streams=8 .* of the 3 .*use a global_batch that 3 divides"),
    ],
)
def test_impossible_splits_are_refused_with_those_that_work(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_stream(ListSource([[1]]), **changes)


def test_impossible_micro_batch_is_refused_with_those_that_work() -> None:
    stream = make_stream(ListSource([[1]]), num_ranks=2)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide the 8 rows.*\[1, 2, 4, 8\]"):
        stream.next_step(3)


# ---- Bad documents ---------------------------------------------------------------------------------------


BAD_LINES = {
    "empty": b"",
    "not_utf8": b'{"text": "\xff\xfe"}',
    "huge": json.dumps({"text": "x" * 2000}).encode(),
    "missing_field": b'{"body": "no text"}',
    "broken_json": b'{"text": "trunca',
}


def test_every_kind_of_bad_document_is_counted_and_located(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [line for bad in BAD_LINES.values() for line in (b'{"text": "fine"}', bad)]
    path, reported = write_lines(tmp_path / "a.jsonl", lines), []
    stream = make_stream(
        data.JsonlSource(path),
        tokenizer=tokenizer,
        report=reported.append,
        num_streams=1,
        global_batch=1,
        max_document_mb=0.001,
        shuffle=False,
    )
    while cursor_of(stream)[0, 0] < len(lines):
        step_rows(stream)
    first = reported[: len(BAD_LINES)]  # the row may reach into the second epoch
    assert (
        [bad.kind for bad in first]
        == list(BAD_LINES)
        == [kind for kind in data.BAD_KINDS if kind not in ("corrupt", "turns", "no_label")]
    )
    assert [bad.where for bad in first] == [f"{path}:{2 * i + 2}" for i in range(len(BAD_LINES))]
    kinds = Counter(bad.kind for bad in reported)
    assert {kind: stream.counts[kind] for kind in BAD_LINES} == kinds


@pytest.mark.parametrize("kind", BAD_LINES)
def test_fatal_raises_at_the_bad_document(tmp_path: Path, tokenizer: Tokenizer, kind: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", [b'{"text": "fine"}', BAD_LINES[kind], b'{"text": "fine"}'])
    stream = make_stream(data.JsonlSource(path), tokenizer=tokenizer, on_bad="fatal", max_document_mb=0.001)
    with pytest.raises(BadDocument, match=rf"a\.jsonl:2: {kind}: "):
        step_rows(stream)


def test_text_that_no_encoding_can_hold_is_a_bad_document(tokenizer: Tokenizer) -> None:
    stream = make_stream(
        TextListSource(["fine", "half a pair: \ud800", "fine too"]), tokenizer=tokenizer, num_streams=1
    )
    step_rows(stream)
    assert stream.counts["not_utf8"] > 0


def test_too_many_bad_documents_end_the_stream_and_empty_ones_do_not(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A tenth of 200 lines is broken: the eleventh bad document is one too many if a twentieth may be bad."""
    bad = {10 * i: b"{" for i in range(20)}
    lines = [bad.get(i, b'{"text": "fine words, and more"}') for i in range(200)]
    source = data.JsonlSource(write_lines(tmp_path / "a.jsonl", lines))
    settings = {"tokenizer": tokenizer, "num_streams": 1, "global_batch": 4, "shuffle": False}
    strict, lenient = (make_stream(source, max_bad=share, **settings) for share in (0.05, 0.12))
    with pytest.raises(
        data.DataError,
        match=r"^11 of \d+ documents were bad, .*a.jsonl:101: broken_json.*data.max_bad=0.05 of",
    ):
        for _ in range(200):
            step_rows(strict)
    while lenient.counts["broken_json"] < 40:
        step_rows(lenient)
    empty = data.JsonlSource(
        write_lines(tmp_path / "b.jsonl", [line if line != b"{" else b"" for line in lines])
    )
    stream = make_stream(empty, max_bad=0, **settings)
    while stream.counts["empty"] < 40:
        step_rows(stream)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (rb'{"text": null}', "missing_field"),
        (rb'{"text": 7}', "missing_field"),
        (rb'["text"]', "missing_field"),
        (rb'{"text": ""}', "empty"),
        (rb'{"text": "half a pair: \ud800"}', "not_utf8"),
        (b"[" * 100_000, "broken_json"),  # nested too deep for the parser
    ],
)
def test_odd_lines_are_bad_documents(tmp_path: Path, tokenizer: Tokenizer, line: bytes, kind: str) -> None:
    source = data.JsonlSource(write_lines(tmp_path / "a.jsonl", [line, b'{"text": "fine"}']))
    stream = make_stream(source, tokenizer=tokenizer)
    step_rows(stream)
    assert stream.counts[kind] > 0


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_corpus_of_bad_documents_is_an_error(tmp_path: Path, tokenizer: Tokenizer, shuffle: bool) -> None:
    source = data.JsonlSource(write_lines(tmp_path / "a.jsonl", [b"{", b"[]", b""] * 5))
    with pytest.raises(ValueError, match=r"no usable document in a whole epoch.*a\.jsonl"):
        step_rows(make_stream(source, tokenizer=tokenizer, shuffle=shuffle))
    with pytest.raises(ValueError, match="holds no document"):
        make_stream(data.JsonlSource(write_lines(tmp_path / "none.jsonl", [])))


def test_one_usable_document_in_a_bad_corpus_is_found(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = data.JsonlSource(write_lines(tmp_path / "a.jsonl", [b"{", b'{"text": "fine"}', b"", b"[]"]))
    tokens = step_rows(make_stream(source, tokenizer=tokenizer))[0]
    assert set(tokens.flatten().tolist()) == {0, *tokenizer.encode("fine").ids}


# ---- Tokenizer -------------------------------------------------------------------------------------------


def test_trained_vocabulary_is_exact_and_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 300
    assert data.end_of_text_id(tokenizer) == 0
    text = "<|endoftext|> stays text,\n\tas do naïve 漢字 🙂 \r\n  and <s> </s>"
    stream = make_stream(TextListSource([text]), tokenizer=tokenizer, num_streams=1, global_batch=16)
    tokens = step_rows(stream)[0].flatten().tolist()
    end = tokens.index(0)  # the first token 0 is the end of the document, not one inside of it
    assert tokenizer.decode(tokens[:end]) == text
    assert tokens[end + 1 : 2 * end + 1] == tokens[:end]


def test_saved_tokenizers_load_with_their_own_end_of_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    renamed = tokenizer.to_str().replace("<|endoftext|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(renamed, encoding="utf-8")
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = data.load_tokenizer(str(spec), source=None, vocab_size=1000)
        assert loaded.id_to_token(data.end_of_text_id(loaded)) == "</s>"
        assert 0 not in loaded.encode("text with </s> in it").ids
    with pytest.raises(ValueError, match=r"needs model.vocab_size=300, which is 299"):
        data.load_tokenizer(str(tmp_path), source=None, vocab_size=299)
    (tmp_path / "tokenizer.json").write_text(renamed.replace("</s>", "<end>"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no end-of-text token; looked for <\|endoftext\|>, .*<\|eos\|>"):
        data.load_tokenizer(str(tmp_path), source=None, vocab_size=1000)


def test_a_tokenizer_that_makes_its_library_panic_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """A panic of Rust is no Exception in Python."""
    content = json.loads(tokenizer.to_str())
    content["model"]["continuing_subword_prefix"] = "x" * 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"^data\.tokenizer=.*: cannot load it \(.*; give train, a tokenizer"
    ):
        data.load_tokenizer(str(tmp_path), source={}, vocab_size=1024)


def test_truncation_stored_in_a_tokenizer_is_off(tmp_path: Path, tokenizer: Tokenizer) -> None:
    truncating = Tokenizer.from_str(tokenizer.to_str())
    truncating.enable_truncation(4)
    truncating.enable_padding(length=64)
    truncating.save(str(tmp_path / "tokenizer.json"))
    loaded = data.load_tokenizer(str(tmp_path), source=None, vocab_size=300)
    text = "the quick brown fox"
    assert loaded.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize("spec", ["no/such/tokenizer", "nobody-has-this-name", "."])
def test_missing_tokenizers_are_refused_with_a_remedy(spec: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"data.tokenizer={spec}: cannot load it.*give train"):
        data.load_tokenizer(spec, source=None, vocab_size=300)


def test_trained_tokenizer_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the fingerprint of the corpus and the size of the vocabulary."""
    trained, train = [], data.tokenizer.train_tokenizer
    monkeypatch.setattr(
        data.tokenizer, "train_tokenizer", lambda *args: trained.append(args[1]) or train(*args)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog")
    for vocab_size in (262, 262, 263):
        data.load_tokenizer("train", source=data.TextSource(str(tmp_path)), vocab_size=vocab_size)
    assert trained == [262, 263]
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dogs")
    data.load_tokenizer("train", source=data.TextSource(str(tmp_path)), vocab_size=262)
    assert trained == [262, 263, 262]
    assert len(list((tmp_path / "cache" / "triquetra").iterdir())) == 3  # and no unfinished file
    with pytest.raises(ValueError, match=r"=5000: .* vocabulary of \d+; use model.vocab_size=\d+"):
        data.load_tokenizer("train", source=data.TextSource(str(tmp_path)), vocab_size=5000)


def test_training_a_tokenizer_is_deterministic() -> None:
    texts = TextListSource([f"{i} green bottles hanging on the wall number {i * i}" for i in range(500)])
    one, other = (data.tokenizer.train_tokenizer(texts, 400).to_str() for _ in range(2))
    assert one == other


def test_a_tokenizer_is_asked_for_where_it_is_needed() -> None:
    assert data.load_tokenizer(None, source=ListSource([[1]]), vocab_size=300) is None
    with pytest.raises(ValueError, match=r"needs text"):
        data.tokenizer.train_tokenizer(ListSource([[1]]), 300)
    with pytest.raises(ValueError, match=r"list:0 is text; set data.tokenizer"):
        step_rows(make_stream(TextListSource(["text"])))


# ---- Sources ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"", b"\n", b"\n\n"])
def test_jsonl_lines_are_those_of_readlines(tmp_path: Path, tail: bytes) -> None:
    rows = [f"row {i} " + "é" * (i % 7) for i in range(50)]
    lines = [json.dumps({"text": row}, ensure_ascii=i % 2 == 0).encode() for i, row in enumerate(rows)]
    write_lines(tmp_path / "b.jsonl", [b"\n".join(lines) + tail])
    (tmp_path / "a.jsonl").write_bytes(b"")  # a file without a line
    (tmp_path / "c.jsonl").write_bytes(lines[0] + b"\r\n" + lines[1])
    source = data.JsonlSource(str(tmp_path))
    with (tmp_path / "b.jsonl").open("rb") as file:
        expected = [json.loads(line)["text"] if line.strip() else "empty" for line in file.readlines()]
    assert [outcome(source, i) for i in range(len(source))] == [*expected, rows[0], rows[1]]
    assert source[len(source) - 1].where == f"{tmp_path / 'c.jsonl'}:2"


def test_jsonl_index_holds_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"".join(b"x" * (i % 5) + b"\n" for i in range(100)) + b"tail"
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    monkeypatch.setattr(data.files, "SCAN_BYTES", 3)
    offsets = data.files.line_offsets(path).tolist()
    assert [content[a:b] for a, b in pairwise(offsets)] == content.splitlines(keepends=True)


def test_text_files_one_document_each_by_file_directory_and_glob(tmp_path: Path) -> None:
    texts = {"b.txt": "bee", "a.txt": "ay\r\n", "deep/er/c.txt": "sea", "not.md": "no"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    below = data.TextSource(str(tmp_path))
    assert [outcome(below, i) for i in range(len(below))] == ["ay\r\n", "bee", "sea", "not_utf8"]
    assert [d.text for d in data.TextSource(str(tmp_path / "[ab].txt"))] == ["ay\r\n", "bee"]
    assert [d.text for d in data.TextSource(str(tmp_path / "**" / "c.txt"))] == ["sea"]
    assert data.TextSource(str(tmp_path / "not.md"))[0].text == "no"


def test_the_standard_library_is_a_corpus() -> None:
    source = data.PythonSource()
    names = [file.name for file in source.files]
    assert {"argparse.py", "decoder.py", "events.py"} <= set(names)  # top level, json/, asyncio/
    assert not any("site-packages" in file.parts for file in source.files)
    place = source.files.index(Path(json.__file__))
    assert source[place].text == Path(json.__file__).read_text(encoding="utf-8")
    assert source.fingerprint == data.PythonSource().fingerprint


def test_fingerprint_follows_names_sizes_and_field_and_not_the_folder(tmp_path: Path) -> None:
    def written(folder: str, name: str, line: bytes, field: str = "text") -> str:
        (tmp_path / folder).mkdir()
        return data.JsonlSource(write_lines(tmp_path / folder / name, [line]), field).fingerprint

    first = written("one", "a.jsonl", b"{}")
    assert written("two", "a.jsonl", b"{}") == first
    others = {written("3", "b.jsonl", b"{}"), written("4", "a.jsonl", b"{ }")}
    assert len(others | {written("5", "a.jsonl", b"{}", field="body"), first}) == 4


@pytest.mark.parametrize("source", [data.TextSource, data.JsonlSource, data.ParquetSource])
def test_a_path_without_files_is_refused_with_path_and_remedy(source: type, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "*.none"):
        with pytest.raises(ValueError, match=rf"{tmp_path}.*no file matches; give a file, a directory"):
            source(str(path))


def test_parquet_rows_are_those_of_pyarrow(tmp_path: Path) -> None:
    texts = [None if i == 13 else f"row {i}" for i in range(57)]
    for name, rows in {"a": texts[:30], "b": texts[30:30], "c": texts[30:]}.items():
        table = pa.table({"id": list(range(len(rows))), "body": pa.array(rows, pa.string())})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    source = data.ParquetSource(str(tmp_path), field="body")
    expected = [v for name in "abc" for v in pq.read_table(tmp_path / f"{name}.parquet")["body"].to_pylist()]
    order = np.random.default_rng(0).permutation(57).tolist()
    assert len(source) == 57
    assert [outcome(source, i) for i in order] == [expected[i] or "missing_field" for i in order]
    assert source[30].where == f"{tmp_path / 'c.parquet'}:1"
    assert source[47].where == f"{tmp_path / 'c.parquet'}:18"
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'text'; .*\['id', 'body'\]"):
        data.ParquetSource(str(tmp_path))


def test_parquet_text_that_is_not_utf8_is_a_bad_document(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"\xff"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    source = data.ParquetSource(str(tmp_path))
    assert [outcome(source, i) for i in range(2)] == ["fine", "not_utf8"]


# ---- Streaming -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """37 documents in two files, of very different lengths; one lacks its text."""
    folder = tmp_path_factory.mktemp("hub")
    texts = [None if i == 5 else f"document {i} " * (1 + i * i % 11) for i in range(37)]
    for name, rows in {"a": texts[:20], "b": texts[20:]}.items():
        write_lines(folder / f"{name}.jsonl", [json.dumps({"text": row, "id": 0}).encode() for row in rows])
    return str(folder)


def test_streamed_rows_equal_those_of_the_indexed_corpus_on_any_ranks_and_after_resumes(
    hub_dir: str, tokenizer: Tokenizer
) -> None:
    """`datasets` against our own reader of the same files; 3 epochs, ranks 2 -> 8 -> 4 -> 1."""
    indexed = make_stream(data.JsonlSource(hub_dir), tokenizer=tokenizer, shuffle=False, seq_len=64)
    state = None
    for num_ranks in (2, 8, 4, 1):
        workers = int(num_ranks in (1, 4))  # then a thread reads, and a process tokenises
        streams = [
            make_stream(
                data.HubSource(hub_dir),
                tokenizer=tokenizer,
                seq_len=64,
                rank=rank,
                num_ranks=num_ranks,
                workers=workers,
            )
            for rank in range(num_ranks)
        ]
        if state:
            load(streams, state)
        for _ in range(2):
            assert torch.equal(global_rows(streams), step_rows(indexed))
        state = gathered(streams)
    assert torch.equal(state["counts"], indexed.state_dict()["counts"])
    assert streams[0].counts == indexed.counts
    assert indexed.counts["epoch"] >= 2


def test_streaming_keeps_only_what_this_rank_still_wants(hub_dir: str, tokenizer: Tokenizer) -> None:
    split = {"tokenizer": tokenizer, "num_ranks": 4}
    streams = [make_stream(data.HubSource(hub_dir), rank=rank, **split) for rank in range(4)]
    opened = []
    for stream in streams:
        source = stream.readers[0].source
        seek = source.seek
        source.seek = lambda *args, seek=seek, **kw: opened.append(args) or seek(*args, **kw)
    for step in range(30):
        if step == 15:  # a resume opens once, at the slowest stream
            load(streams, gathered(streams))
            assert opened == [(int(cursor_of(stream)[:, 0].min()),) for stream in streams]
        global_rows(streams)
        for stream in streams:
            cursor = stream.readers[0].due  # a little ahead of what was delivered
            between = range(min(cursor.values()), max(cursor.values()) + 1)
            mine = {n for n in between if n % 8 in stream.streams}
            assert set(stream.readers[0].source.kept) <= {n for n in mine if n >= cursor[n % 8]}
    assert len(opened) == 4  # forward only: nothing was read a second time


def test_a_streamed_document_further_back_is_found_again(hub_dir: str) -> None:
    source, indexed = data.HubSource(hub_dir), data.JsonlSource(hub_dir)
    for i in (3, 36, 0, 20, 37 + 4, 7, 74 + 1):
        assert source[i].text == indexed[i % 37].text
    late = data.HubSource(hub_dir)
    late.seek(3 * 37 + 2, wanted=lambda i: False)  # begins past the end, whose place it does not know yet
    assert late[3 * 37 + 2].text == indexed[2].text


def test_streaming_refuses_what_it_cannot_open(hub_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot open the dataset .*check name="):
        data.HubSource(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"cannot open the dataset"):
        data.HubSource(hub_dir, split="no such split")
    fingerprints = {data.HubSource(hub_dir, field=field).fingerprint for field in ("text", "text", "id")}
    assert len(fingerprints) == 2


def test_training_a_tokenizer_on_a_stream_leaves_the_stream_at_its_start(hub_dir: str) -> None:
    source = data.HubSource(hub_dir)
    with pytest.raises(ValueError, match="gives a vocabulary of"):  # it read to the end and no further
        data.tokenizer.train_tokenizer(source, 10_000)
    assert source[0].text == data.JsonlSource(hub_dir)[0].text


# ---- Synthetic documents ---------------------------------------------------------------------------------


def test_a_synthetic_document_is_a_function_of_seed_and_number() -> None:
    source, again = data.SyntheticSource(1024), data.SyntheticSource(1024)
    wanted = [7, 3, 999_999, 3, 0]
    for i, j in zip(wanted, reversed(wanted), strict=True):
        again[j]  # another history
        assert np.array_equal(source[i].tokens, again[i].tokens)
    assert not np.array_equal(source[3].tokens[:8], source[4].tokens[:8])
    assert not np.array_equal(source[3].tokens[:8], data.SyntheticSource(1024, seed=1)[3].tokens[:8])
    assert source.fingerprint == again.fingerprint != data.SyntheticSource(1024, seed=1).fingerprint


def test_synthetic_topics_are_zipf_in_their_own_slices_with_a_bigram_to_learn() -> None:
    num_topics, skew, width, noise = 8, 1.2, 100, 0.25
    source = data.SyntheticSource(
        num_topics * width + 1,
        num_topics=num_topics,
        topic_skew=skew,
        noise=noise,
        mean_length=200.0,
        length_sigma=0.5,
    )
    documents = [source[i].tokens.astype(int) for i in range(3000)]
    assert all(document[-1] == 0 and (document[:-1] > 0).all() for document in documents)
    topics = [set(((document[:-1] - 1) // width).tolist()) for document in documents]
    assert all(len(topic) == 1 for topic in topics)
    frequency = Counter(topic.pop() for topic in topics)
    weights = [1 / (k + 1) ** skew for k in range(num_topics)]
    for k, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(frequency[k] / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5  # four standard deviations
    assert abs(np.mean([len(d) - 1 for d in documents]) / 200 - 1) < 0.05  # 5 standard deviations
    steps = np.concatenate([np.diff(d[:-1]) % width for d in documents if (d[0] - 1) // width == 2])
    share = np.mean(steps == np.bincount(steps).argmax())
    assert abs(share - (1 - noise + noise / width)) < 0.01  # the likely successor, or a jump that hits it


def test_synthetic_vocabulary_too_small_for_its_topics_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=64 holds no 32 topics.*use 65 or more"):
        data.SyntheticSource(64)
    assert len(data.SyntheticSource(65)) == 1_000_000
