"""Does its length draw a document with the probability of the curve, before it is tokenised, and alike on
any ranks and workers, after any restart?

Origins of the expected values: arithmetic of the curve, binomial deviations (3 sigma), each number asked of
the hash one by one, invariance, and documents whose tokens say which they are.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.ranks import run_ranks
from tests.runs import BASE, metrics, tensors
from tests.streams import (
    ListSource,
    TextListSource,
    equal,
    gathered,
    global_rows,
    load,
    make_stream,
    open_documents,
    ranks,
    step_rows,
)
from trainer import train
from trainer.config import ConfigError
from trainer.data import COUNTED, BadDocument, DataError, Document, LengthBias
from trainer.run import state, step

# As the published one, a thousand times shorter.
SMALL = LengthBias(short=8, long=128)
NEVER_SHORT = LengthBias(short=8, long=16, at_short=0.0, at_long=1.0)


# -- the curve ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "probability"),
    [
        (1, 0.01),
        (8192, 0.01),
        (16_384, 0.2325),  # a quarter of the way from 2^13 to 2^17: 0.01 + 0.89 / 4
        (32_768, 0.455),
        (65_536, 0.6775),
        (131_072, 0.9),
        (10**8, 0.9),
    ],
)
def test_the_curve_by_hand(length: int, probability: float) -> None:
    assert LengthBias().probability(length) == pytest.approx(probability, abs=1e-12)


class Lengths:
    """Documents whose tokens all say their length."""

    def __init__(self, lengths: list[int], num_documents: int) -> None:
        self.lengths, self.num_documents, self.fingerprint = lengths, num_documents, "lengths"

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, i: int) -> Document:
        length = self.lengths[i % len(self.lengths)]
        return Document(f"lengths:{i}", tokens=np.full(length, length, np.uint32))


def test_shares_over_a_hundred_thousand_documents_are_the_curve() -> None:
    """Within 3 sigma of a binomial for each of seven lengths."""
    lengths, each = [1, 8, 12, 16, 40, 128, 200], 15_000
    source, stream = Lengths(lengths, each * 7), None
    config = {"num_streams": 4, "seq_len": 4096, "global_batch": 8, "at_end": "stop"}
    stream = make_stream(source, length_bias={"source": SMALL}, **config)
    tokens = Counter[int]()
    while stream.has_more():
        rows = step_rows(stream, 8)
        tokens.update(Counter(rows[0][rows[2] >= 0].tolist()))
    for length in lengths:
        share = SMALL.probability(length)
        sigma = math.sqrt(each * share * (1 - share))
        assert abs(tokens[length] / length - each * share) <= 3 * sigma
    drawn = sum(tokens[length] // length for length in lengths)
    assert stream.counts["documents"] == drawn and stream.counts["not_drawn"] == each * 7 - drawn


def test_draws_of_epochs_sources_and_seeds_are_independent() -> None:
    """Of 40,000 documents at 0.455: both of two draws take 0.455^2 of them."""
    half = {"source": "data.source", "seed": 0}
    changes = [{"seed": 1}, {"source": "data.sources.web"}, {}]
    one = [SMALL.draws(32, **half, number=n) for n in range(40_000)]
    for i, change in enumerate(changes):
        shift = 40_000 if i == 2 else 0  # another epoch
        other = [SMALL.draws(32, **{**half, **change}, number=n + shift) for n in range(40_000)]
        both = sum(a and b for a, b in zip(one, other, strict=True))
        share = 0.455**2
        assert abs(both - 40_000 * share) <= 3 * math.sqrt(40_000 * share * (1 - share))


# -- the same rows whatever reads them ---------------------------------------------------------------------


def ragged() -> ListSource:
    """900 documents of 1 to 200 tokens that say which they are."""
    random = np.random.default_rng(5)
    lengths = np.exp(random.uniform(0, math.log(200), 900)).astype(int) + 1
    ends = np.cumsum(lengths)
    return ListSource([list(range(e - n, e)) for e, n in zip(ends, lengths, strict=True)])


BIASED = {"length_bias": {"a": SMALL}, "mixture": {"a": 2.0, "b": 1.0}, "num_streams": 4, "global_batch": 8}


def two_sources() -> dict[str, ListSource]:
    """The same documents twice: one draws them by length, and says so by its tokens."""
    return {"a": ragged(), "b": ListSource([[t + 1_000_000 for t in d] for d in ragged().documents])}


@pytest.mark.parametrize("buffer", [0, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_resumes_change_nothing(buffer: int, workers: int) -> None:
    settings = {**BIASED, "buffer": buffer}
    alone, streams, saved = [make_stream(two_sources(), **settings)], None, None
    for turn in range(8):
        expected = global_rows(alone)
        if turn % 2 == 0:
            streams = ranks((1, 2, 4, 2)[turn // 2], two_sources(), workers=workers, **settings)
            if saved:
                load(streams, saved)
        assert torch.equal(global_rows(streams), expected)
        saved = gathered(streams)
        assert equal(saved, gathered(alone))
        if turn % 2:
            for stream in streams:
                stream.close()
    assert saved["counts"][COUNTED.index("not_drawn")] > 0  # of all ranks


def test_only_the_biased_source_passes_documents_over_and_each_as_the_hash_says() -> None:
    stream, source = make_stream(two_sources(), **BIASED, shuffle=False), ragged()
    seen = set(torch.cat([step_rows(stream, 8)[0].flatten() for _ in range(30)]).tolist())
    follows = stream.state_dict()["next_VS"].tolist()
    heads = {(s, n) for s, n, _ in open_documents(stream)}
    for v in range(4):
        for s, shift in ((0, 0), (1, 1_000_000)):
            for n in range(v, follows[v][s], 4):
                document = source.documents[n % 900]
                draws = SMALL.draws(len(document), seed=3, source="data.sources.a", number=n)
                was_read = document[0] + shift in seen or (s, n) in heads
                assert was_read or not (s == 1 or draws)
                assert n >= 900 or was_read == (s == 1 or draws)


def test_a_document_that_is_open_stays_open_under_another_bias() -> None:
    """A branch may set one, and what was opened before is read to its end."""
    source, sizes = ListSource([[n] * 40 for n in range(1, 60)]), {"num_streams": 2, "global_batch": 2}
    plain = make_stream(source, buffer=2, shuffle=False, **sizes)
    for _ in range(3):
        step_rows(plain)
    before = {1 + n % 59 for _, n, _ in open_documents(plain)}
    bias = LengthBias(short=64, long=65)
    assert not any(bias.draws(40, seed=3, source="data.source", number=n - 1) for n in before)
    biased = make_stream(source, buffer=2, shuffle=False, length_bias={"source": bias}, **sizes)
    biased.load_state_dict(plain.state_dict(), keep_counts=True)
    seen = torch.cat([step_rows(biased)[0].flatten() for _ in range(30)])
    assert before and before <= set(seen.tolist()) and biased.counts["not_drawn"] > 0


# -- before anything is tokenised --------------------------------------------------------------------------


def letters() -> Tokenizer:
    """A token for each letter, so that a text has as many as it has bytes."""
    tokenizer = Tokenizer(
        models.WordLevel({chr(97 + i): i for i in range(26)} | {"[EOS]": 26}, unk_token="a")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.mark.parametrize("bytes_per_token", [1.0, 4.0])
def test_a_text_that_is_not_drawn_is_not_tokenised(bytes_per_token: float) -> None:
    random = np.random.default_rng(1)
    texts = ["a" * int(n) for n in np.exp(random.uniform(0, math.log(600), 2000)).astype(int) + 1]
    bias = LengthBias(short=8, long=128, bytes_per_token=bytes_per_token)
    stream = make_stream(
        TextListSource(texts), tokenizer=letters(), shuffle=False, prefetch=1, length_bias={"source": bias}
    )
    encode, encoded = stream.intake.encode, []
    stream.intake.encode = lambda batch: encoded.extend(batch) or encode(batch)
    for _ in range(20):
        step_rows(stream)
    assert stream.counts["not_drawn"] > stream.counts["documents"]
    drawn = [
        text
        for n, text in enumerate(texts)
        if bias.draws(len(text) / bytes_per_token, seed=3, source="data.source", number=n)
    ]
    assert encoded and not Counter(encoded) - Counter(drawn)  # each was drawn, and encoded once


def test_a_source_that_only_reads_forward_draws_too() -> None:
    class Forward:
        fingerprint, num_rows = "forward", None

        def seek(self, first: int, *, wanted: object) -> None:
            self.first = first

        def __getitem__(self, i: int) -> Document:
            return Document(f"forward:{i}", tokens=np.full(40, i % 5000, np.uint32))

    streams = [
        make_stream(Forward(), num_streams=2, global_batch=2, workers=workers, length_bias={"source": SMALL})
        for workers in (0, 1)
    ]
    rows = [torch.cat([step_rows(stream)[0].flatten() for _ in range(50)]) for stream in streams]
    expected = [n for n in range(200) if SMALL.draws(40, seed=3, source="data.source", number=n)]
    assert torch.equal(*rows)
    assert set(rows[0].tolist()) <= set(expected) or max(rows[0]) >= 200
    assert set(expected[:5]) <= set(rows[0].tolist())
    streams[1].close()


# -- what cannot be ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_corpus_without_a_document_that_could_be_drawn_is_refused() -> None:
    stream = make_stream(ListSource([[1, 2, 3]] * 5), length_bias={"source": NEVER_SHORT})
    with pytest.raises(
        DataError, match=r"no usable document in a whole epoch, .*not_drawn.*; check data.source"
    ):
        step_rows(stream)


def test_few_documents_are_waited_for() -> None:
    """5 short documents at 1 %: 101 times an epoch would have to pass for the corpus to look empty."""
    stream = make_stream(ListSource([[1, 2, 3]] * 5), length_bias={"source": SMALL})
    for _ in range(3):
        step_rows(stream)
    assert stream.counts["not_drawn"] > 50 * stream.counts["documents"]


def test_a_document_that_is_not_drawn_is_no_bad_one() -> None:
    bad = list[BadDocument]()
    stream = make_stream(
        ListSource([[1] * 4] * 900 + [[]]),
        report=bad.append,
        on_bad="skip",
        max_bad=0.0,
        length_bias={"source": SMALL},
    )
    step_rows(stream)
    assert {document.kind for document in bad} <= {"empty"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.length_bias.web={}", "data.length_bias.web: there is no source web (there are: source)"),
        (
            "data.length_bias.source=3",
            "data.length_bias.source=3: must be {}, or numbers like {long: 131072}",
        ),
        ("data.length_bias.source={shrt: 1}", "Key 'shrt' not in 'LengthBiasConfig' (did you mean short"),
        ("data.length_bias.source={short: 0}", "data.length_bias.source.short=0.0: must be at least 1"),
        ("data.length_bias.source={at_long: 0}", "data.length_bias.source.at_long=0.0: must be above 0"),
        ("data.length_bias.source={at_short: 1.5}", "source.at_short=1.5: must be at most 1 (a probability)"),
        (
            "data.length_bias.source={short: 200000}",
            "data.length_bias.source.short=200000 must be below data.length_bias.source.long=131072 tokens",
        ),
    ],
)
def test_wrong_settings_are_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        train.load(["experiment=demo", override])
    assert message in str(error.value) and "\n" not in str(error.value)


# -- a whole run -------------------------------------------------------------------------------------------


def train_worker(overrides: list[str], stop_at: int | None = None, old: bool = False) -> int:
    """old: as before the count of documents that were not drawn was kept, and what was counted since."""
    if old:
        for module in (state, step, __import__("trainer.data.stream", fromlist=["stream"])):
            module.COUNTED = COUNTED[: COUNTED.index("not_drawn")]
        step.BAD_KINDS = train.BAD_KINDS = [kind for kind in step.BAD_KINDS if kind in step.COUNTED]
    config = train.load([*BASE, *overrides])
    config.steps = stop_at or config.steps
    return train.train(config)


@pytest.mark.slow
def test_a_branch_sets_a_bias_and_a_checkpoint_from_before_the_count_is_read(tmp_path):
    where, bias = (
        [f"run_dir={tmp_path}", "steps=6", "stage=constant"],
        "data.length_bias.source={short: 20, long: 100}",
    )
    run_ranks(train_worker, 1, ["name=base", *where], 3, True)
    assert "data/not_drawn" not in metrics(tmp_path / "base")[-1]
    longer = ["name=longer", f"branch={tmp_path}/base", bias, *where]
    run_ranks(train_worker, 1, longer)
    lines = metrics(tmp_path / "longer")
    assert [line["step"] for line in lines] == [4, 5, 6] and lines[-1]["data/not_drawn"] > 0
    run_ranks(train_worker, 1, ["name=parts", *longer[1:]], 5)
    run_ranks(train_worker, 1, ["name=parts", *longer[1:]])
    assert metrics(tmp_path / "parts") == lines
    one, other = tensors(tmp_path / "longer", 6), tensors(tmp_path / "parts", 6)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["stream.counts"][COUNTED.index("not_drawn")] == lines[-1]["data/not_drawn"]
