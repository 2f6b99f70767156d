"""A corpus that is written once as tokens, and files in Megatron's layout.

The oracle of our own files is the stream over the texts themselves: the rows must be the same bit for bit.
The files of Megatron were written by megatron-core 0.16.1 (IndexedDatasetBuilder: add_document, add_item,
end_document, finalize); their bytes stand here.
"""

import json
import os
import re
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.streams import ListSource, TextListSource, make_stream, numbered, step_rows
from trainer import tokenize as command
from trainer.config import ConfigError, load
from trainer.data import (
    BadDocument,
    JsonlSource,
    LengthBias,
    MegatronSource,
    Reader,
    Tokenizing,
    TokensSource,
    content_hash,
    finish,
    load_tokenizer,
    plan_of,
)
from trainer.data import shards as shards_module
from trainer.data import tokenize as writing
from trainer.run.build import sources_of

WORDS = ["alpha", "beta", "é", "gamma\n", "delta ", " 12"]
VOCAB = 290
LIMIT_MB = 0.002


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "triquetra"


@pytest.fixture
def texts(tmp_path) -> JsonlSource:
    """300 documents; some are broken, empty, too large, or lack the field."""
    random = np.random.default_rng(1)
    drawn = [" ".join(random.choice(WORDS, random.integers(1, 60))) for _ in range(300)]
    lines = [json.dumps({"text": text}) for text in drawn]
    lines[7], lines[20], lines[33], lines[35] = "{broken", "", json.dumps({"text": "x" * 3000}), '{"no": 1}'
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return JsonlSource(str(tmp_path / "texts.jsonl"))


@pytest.fixture
def tokenizer(texts):
    return load_tokenizer("train", source=texts, vocab_size=VOCAB)


def begun(texts, tokenizer, draft: Path, *, shard_mb: float = 0.012) -> Tokenizing:
    plan = plan_of(texts, tokenizer, shard_mb=shard_mb, max_document_mb=LIMIT_MB)
    draft.mkdir(exist_ok=True)
    reader = Reader(texts, key="data.source", seed=0, shuffle=False, num_streams=1)
    return Tokenizing(texts, tokenizer, plan, draft, backend="tokenizers", reader=reader)


def written(texts, tokenizer, out: Path, *, processes: int = 2) -> Path:
    tokenizing = begun(texts, tokenizer, out.with_name(f"{out.name}.draft"))
    finish(tokenizing, tokenizing.run(processes=processes, report=lambda k, shard: None), out)
    return out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- The same rows ---------------------------------------------------------------------------------------

STREAMS = {
    "in order": {"shuffle": False},
    "a buffer": {"buffer": 4},
    "held out": {"holdout": 0.3},
    "by length": {"length_bias": {"source": LengthBias(short=20, long=100, at_short=0.2)}},
    "fit": {"packing": "fit"},
    "a worker": {"workers": 1, "buffer": 2},
    "a smaller limit": {"max_document_mb": 1e-4},
    "to the end": {"at_end": "stop"},
}


@pytest.mark.parametrize("changes", STREAMS.values(), ids=STREAMS)
def test_the_rows_are_those_of_the_texts(texts, tokenizer, tmp_path, changes: dict) -> None:
    tokens = TokensSource(str(written(texts, tokenizer, tmp_path / "out")), vocab_size=VOCAB)
    assert len(tokens.shards) > 2 and len(tokens) == len(texts)
    changes = {"max_document_mb": LIMIT_MB, **changes}
    of_texts = make_stream(texts, tokenizer=tokenizer, **changes)
    of_tokens = make_stream(tokens, tokenizer=tokenizer, **changes)
    for _ in range(60):
        assert torch.equal(step_rows(of_texts), step_rows(of_tokens))
    assert of_texts.counts == of_tokens.counts


def test_a_mixture_with_texts_has_the_rows_of_texts(texts, tokenizer, tmp_path) -> None:
    tokens = TokensSource(str(written(texts, tokenizer, tmp_path / "out")))
    other = TextListSource(["the other source " * 9] * 50)
    mixture = {"mixture": {"a": 1.0, "b": 2.0}, "buffer": 3, "max_document_mb": LIMIT_MB}
    one = make_stream({"a": texts, "b": other}, tokenizer=tokenizer, **mixture)
    two = make_stream({"a": tokens, "b": other}, tokenizer=tokenizer, **mixture)
    for _ in range(40):
        assert torch.equal(step_rows(one), step_rows(two))


def test_a_document_keeps_its_texts_hash_and_its_kind_of_badness(texts, tokenizer, tmp_path) -> None:
    tokens = TokensSource(str(written(texts, tokenizer, tmp_path / "out")))
    for i in range(len(texts)):
        try:
            document = texts[i]
        except BadDocument as bad:
            with pytest.raises(BadDocument, match=rf"out/\d{{5}}:\d+: {bad.kind}: "):
                tokens[i]
            continue
        if i == 33:  # too large for a shard: the limit is the run's
            with pytest.raises(BadDocument, match="huge"):
                tokens[i]
            continue
        there = tokens[i]
        assert content_hash(there) == content_hash(document)
        assert there.num_bytes == len(document.text.encode()) and there.tokens.dtype == np.uint32
        assert there.tokens.tolist() == [*tokenizer.encode(document.text).ids, 0]


def test_ids_beyond_65535_take_four_bytes(tmp_path, texts, tokenizer, monkeypatch) -> None:
    assert [shards_module.dtype_for(num) for num in (2**16, 2**16 + 1)] == ["<u2", "<u4"]
    monkeypatch.setattr(writing, "dtype_for", lambda num_ids: "<u4")
    wide = TokensSource(str(written(texts, tokenizer, tmp_path / "wide")))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    narrow = TokensSource(str(written(texts, tokenizer, tmp_path / "narrow")))
    assert all(wide[i].tokens.tolist() == narrow[i].tokens.tolist() for i in range(7))
    size = [
        path.stat().st_size for path in (tmp_path / "wide/00000.tokens", tmp_path / "narrow/00000.tokens")
    ]
    assert size[0] == 2 * size[1]


# ---- Killed, and gone on with ----------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_file_it_goes_on_and_writes_the_same(texts, tokenizer, tmp_path) -> None:
    """A child ends without a word at the k-th rename; the next start writes what one start writes."""
    expected, replace = contents(written(texts, tokenizer, tmp_path / "whole", processes=1)), os.replace

    def end_at(k: int, draft: Path, out: Path) -> None:
        renames = count()
        os.replace = lambda *to: os._exit(9) if next(renames) == k else replace(*to)
        tokenizing = begun(texts, tokenizer, draft)
        tokenizing.keep_plan()
        shards = [tokenizing.write_shard(i) for i in range(tokenizing.plan.num_shards)]
        finish(tokenizing, shards, out)

    for k in count():
        draft, out = tmp_path / f"{k}.draft", tmp_path / str(k)
        if not (child := os.fork()):
            try:
                end_at(k, draft, out)
            finally:
                os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert contents(out) == expected if code == 0 else not out.exists()
        if code == 0:
            break
        written(texts, tokenizer, out, processes=1)
        assert contents(out) == expected
    # the plan; tokens, index and record of each shard; tokenizer.json and corpus.json
    assert k == 1 + 3 * sum(name.endswith(".index") for name in expected) + 2


def test_only_shards_that_are_not_whole_are_written_again(texts, tokenizer, tmp_path, monkeypatch) -> None:
    tokenizing = begun(texts, tokenizer, tmp_path / "draft")
    shards = tokenizing.run(processes=1, report=lambda k, shard: None)
    (tmp_path / "draft/00001.tokens").write_bytes(b"x")
    (tmp_path / "draft/00002.json").unlink()
    again, made = begun(texts, tokenizer, tmp_path / "draft"), []
    write_shard = again.write_shard
    monkeypatch.setattr(writing, "Workers", lambda num, work: Here(work))
    again.write_shard = lambda k: made.append(k) or write_shard(k)
    assert again.run(processes=1, report=lambda k, shard: None) == shards and made == [1, 2]


class Here:
    """Stands for Workers: the work is done at once."""

    def __init__(self, work) -> None:
        self.work = work

    def submit(self, k: int):
        future = writing.Future()
        future.set_result(self.work(k))
        return future

    def close(self) -> None:
        pass


def test_a_draft_of_another_plan_is_refused(texts, tokenizer, tmp_path) -> None:
    begun(texts, tokenizer, tmp_path / "draft").keep_plan()
    other = begun(texts, tokenizer, tmp_path / "draft", shard_mb=1.0)
    with pytest.raises(ValueError, match=r"draft: was begun with per_shard=\d+, this is \d+; give the same"):
        other.keep_plan()


# ---- What is refused before training ---------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_dtype(path: Path) -> None:
    about = json.loads(path.read_text())
    path.write_text(json.dumps({**about, "dtype": "<u4"}))


DAMAGE = {
    "a bit of the tokens": ("00001.tokens", flip, "00001.tokens: is damaged: its hash is .*; fetch it again"),
    "a bit of the index": ("00000.index", flip, "00000.index: is damaged: its hash is .*; fetch it again"),
    "a cut": ("00001.tokens", lambda p: os.truncate(p, 10), "has 10 bytes, corpus.json says [0-9,]+ .*again"),
    "a cut index": ("00000.index", lambda p: os.truncate(p, 24), "has 24 bytes, corpus.json says"),
    "no shard": ("00001.tokens", Path.unlink, "00001.tokens: is not there, corpus.json says"),
    "another dtype": ("corpus.json", other_dtype, r"00000.tokens: has .* bytes, .*\(dtype <u4\); fetch"),
    "no JSON": ("corpus.json", lambda p: p.write_text("{"), "corpus.json: cannot be read .*; fetch it again"),
    "no corpus.json": (
        "corpus.json",
        Path.unlink,
        "is no corpus of tokens, it has no corpus.json; write one",
    ),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_line(texts, tokenizer, tmp_path, name, damage, message) -> None:
    out = written(texts, tokenizer, tmp_path / "out")
    damage(out / name)
    with pytest.raises(ValueError, match=message) as caught:
        TokensSource(str(out))
    assert "\n" not in str(caught.value)


def test_hashes_are_compared_once_and_again_when_a_file_has_changed(
    texts, tokenizer, tmp_path, monkeypatch
) -> None:
    out, hash_file, seen = written(texts, tokenizer, tmp_path / "out"), shards_module.file_hash, []
    monkeypatch.setattr(shards_module, "file_hash", lambda path: seen.append(path.name) or hash_file(path))
    num_files = 2 * len(TokensSource(str(out)).shards)
    assert len(seen) == num_files
    TokensSource(str(out))
    assert len(seen) == num_files
    os.utime(out / "00001.tokens", ns=(1, 1))
    TokensSource(str(out))
    assert len(seen) == 2 * num_files


def test_ids_beyond_the_vocabulary_and_another_tokenizer_are_refused(texts, tokenizer, tmp_path) -> None:
    out = written(texts, tokenizer, tmp_path / "out")
    tokens = TokensSource(str(out))
    most = max(shard.max_id for shard in tokens.shards)
    assert most == max(max(tokens[i].tokens) for i in range(7)) or most < VOCAB
    TokensSource(str(out), vocab_size=most + 1)
    with pytest.raises(ValueError, match=f"holds the token id {most}, model.vocab_size is {most}; use model"):
        TokensSource(str(out), vocab_size=most)
    load_tokenizer(str(out / "tokenizer.json"), source=tokens, vocab_size=VOCAB)
    other = load_tokenizer("train", source=texts, vocab_size=VOCAB - 10)
    other.save(str(tmp_path / "other.json"))
    for source in (tokens, {"a": texts, "b": tokens}):
        with pytest.raises(
            ValueError, match=r"other.json: is .*, .* has ids of .*; use data.tokenizer=.*out/tok"
        ):
            load_tokenizer(str(tmp_path / "other.json"), source=source, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"data.tokenizer=train needs text.*; use .*out/tokenizer.json"):
        load_tokenizer("train", source=tokens, vocab_size=VOCAB)


def test_a_corpus_without_a_token_is_refused_and_nothing_is_there(tokenizer, tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n\n')
    tokenizing = begun(JsonlSource(str(tmp_path / "empty.jsonl")), tokenizer, tmp_path / "out.draft")
    shards = tokenizing.run(processes=1, report=lambda k, shard: None)
    with pytest.raises(ValueError, match=r"none of the 2 documents has a token \(empty\); check data.source"):
        finish(tokenizing, shards, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Forward:
    fingerprint = "forward"

    def __getitem__(self, i: int):
        raise AssertionError


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Forward(), "only reads forward"),
        (TextListSource([]), "holds no document"),
        (ListSource(numbered([5, 6])), "list:0: is tokens already; tokenize wants a source of texts"),
    ],
)
def test_sources_that_cannot_be_tokenised_are_refused(tokenizer, source, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(source, tokenizer, shard_mb=1, max_document_mb=1)


# ---- The command -----------------------------------------------------------------------------------------


def test_the_command_writes_what_data_tokens_reads(texts, tokenizer, tmp_path, capsys) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = ["data=jsonl", f"data.source.path={tmp_path}/texts.jsonl", "model.vocab_size=290"]
    words += [f"data.tokenizer={tmp_path}/tokenizer.json", f"data.max_document_mb={LIMIT_MB}", "processes=1"]
    out = tmp_path / "out"
    assert command.main([str(out), *words]) == 0
    said = capsys.readouterr()
    assert f"{out}: " in said.out and "tokens of 300 documents in 1 shards; 4 documents have none" in said.out
    assert "1 of 1 shards, " in said.err
    config = load(["experiment=demo", "model.vocab_size=290", "data=tokens", f"data.source.path={out}"])
    source = sources_of(config.data, vocab_size=290)
    load_tokenizer(config.data.tokenizer, source=source, vocab_size=290)
    assert len(source) == 300 and source[0].tokens.tolist() == [*tokenizer.encode(texts[0].text).ids, 0]
    assert command.main([str(out), *words]) == 2
    assert f"error: {out}: is there already; give another directory" in capsys.readouterr().err
    too_small = load(["experiment=demo", "model.vocab_size=280", "data=tokens", f"data.source.path={out}"])
    with pytest.raises(
        ConfigError, match=r"^data.source: .*holds the token id \d+, model.vocab_size is 280; "
    ):
        sources_of(too_small.data, vocab_size=280)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=txt"], "the first word is the directory"),
        (["out", "processes=0"], "processes=0: must be a whole number from 1 to 1,024"),
        (["out", "shard_mb=x"], "shard_mb=x: must be a whole number from 1 to 1,000,000"),
        (["out", "data=mixture"], r"data.sources=\['modules', 'packages'\]: tokenize writes one corpus"),
        (["out", "data.tokenizer=null"], "data.tokenizer=null: give the tokenizer"),
        (["out", "proceses=2"], "did you mean processes"),
    ],
)
def test_wrong_words_are_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(message, said)
    assert not list(tmp_path.iterdir())


# ---- Megatron --------------------------------------------------------------------------------------------

# documents (5, 6, 7, 0), (8, 9 | 300, 0) of two sequences, and (11, 0)
UINT16 = (
    "4d4d494449445800000100000000000000080400000000000000040000000000000004000000020000000200000002000000"
    "000000000000000008000000000000000c000000000000001000000000000000000000000000000001000000000000000300"
    "0000000000000400000000000000",
    "0500060007000000080009002c0100000b000000",
)
INT32 = (
    "4d4d494449445800000100000000000000040400000000000000040000000000000004000000020000000200000002000000"
    "00000000000000001000000000000000180000000000000020000000000000000000000000000000010000000000000003000000"
    "000000000400000000000000",
    "0500000006000000070000000000000008000000090000002c010000000000000b00000000000000",
)


def megatron(directory: Path, pair: tuple[str, str]) -> str:
    for suffix, content in zip(("idx", "bin"), pair, strict=True):
        (directory / f"m.{suffix}").write_bytes(bytes.fromhex(content))
    return str(directory / "m.idx")


@pytest.mark.parametrize("pair", [UINT16, INT32], ids=["uint16", "int32"])
def test_files_that_megatron_core_wrote_are_read(pair, tmp_path) -> None:
    path = megatron(tmp_path, pair)
    source = MegatronSource(path, vocab_size=301)
    documents = [source[i].tokens for i in range(len(source))]
    assert [ids.tolist() for ids in documents] == [[5, 6, 7, 0], [8, 9, 300, 0], [11, 0]]
    assert all(ids.dtype == np.uint32 for ids in documents)
    ended = MegatronSource(path, vocab_size=301, end_of_text=4)
    assert ended[1].tokens.tolist() == [8, 9, 300, 0, 4] and ended.fingerprint != source.fingerprint
    both = make_stream(source, seq_len=4, shuffle=False, num_streams=1, global_batch=1)
    assert step_rows(both)[0, 0].tolist() == [5, 6, 7, 0]
    with pytest.raises(ValueError, match=r"m.bin: holds the token id 300, model.vocab_size is 300; use"):
        MegatronSource(path, vocab_size=300)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def patched(at: int, value: int):
    def patch(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] = value
        path.write_bytes(content)

    return patch


WRONG = {
    "a cut index": ("m.idx", cut, r"m.idx: has 111 bytes, its 4 sequences and 4 documents need 114; .*fetch"),
    "only a magic": ("m.idx", lambda p: os.truncate(p, 9), "does not begin like an index of Megatron's"),
    "no magic": ("m.idx", patched(0, 0), "does not begin like an index of Megatron's"),
    "floats": ("m.idx", patched(17, 7), "has version 1 and dtype code 7; 1 and one of"),
    "another version": ("m.idx", patched(9, 2), "has version 2 and dtype code 8"),
    "another dtype": ("m.idx", patched(17, 4), r"m.bin: has 20 bytes, m.idx speaks of \d+ \(dtype int32\)"),
    "cut ids": ("m.bin", cut, r"m.bin: has 17 bytes, m.idx speaks of 20 \(dtype uint16\); .*fetch both"),
    "no ids": ("m.bin", Path.unlink, "m.bin is not beside it; fetch it"),
    "between ids": ("m.idx", patched(50 + 8, 1), "or between ids"),
    "documents beyond": ("m.idx", patched(114 - 8, 9), "points beyond its 4 sequences"),
}


@pytest.mark.parametrize(("name", "change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_files_of_megatron_are_refused_in_one_line(name, change, message, tmp_path) -> None:
    path = megatron(tmp_path, UINT16)
    change(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        MegatronSource(path)
    assert "\n" not in str(caught.value)


def test_a_corpus_of_megatron_without_a_token_and_negative_ids_are_refused(tmp_path) -> None:
    head = bytes.fromhex(UINT16[0])[:18]
    (tmp_path / "none.idx").write_bytes(
        head + (0).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8)
    )
    (tmp_path / "none.bin").touch()
    with pytest.raises(ValueError, match="the files hold no token"):
        MegatronSource(str(tmp_path / "none.idx"))
    (tmp_path / "none.idx").unlink()
    path = megatron(tmp_path, INT32)
    patched(3, 0x80)(tmp_path / "m.bin")
    with pytest.raises(ValueError, match="m.bin: holds the token id -2147483643; ids are 0 or more"):
        MegatronSource(path, vocab_size=301)
