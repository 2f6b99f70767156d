"""The faster libraries give the ids of `tokenizers`, before and after a fork, and one that does not is found
out.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from trainer.data.encoder import FAST, HARD, Encoder, hard_texts

BACKENDS = ["tokenizers", *FAST]
LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
    r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"  # digits in groups of three, from the right
WORD_END = r"\p{N}{1,3}(?=(?:\p{N}{3})*\b)"  # is there a word's end in 6666↉? tokenizers: yes, fastokens: no


def make_tokenizer(*splits: str) -> Tokenizer:
    """Byte-level BPE with ids above 65,535, as `load_tokenizer` hands it out; `splits`: instead of GPT-2's
    expression.
    """
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    split = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in splits]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level]) if splits else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(HARD * 3 + (tokenizers.__doc__ or "", "the cat and the hat " * 9), trainer)
    saved = json.loads(tokenizer.to_str())
    saved["model"]["vocab"] |= {f"unused {i}": i for i in range(len(saved["model"]["vocab"]), 70_000)}
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.add_special_tokens(["<|im_start|>", "</s>"])
    tokenizer.add_tokens(
        [AddedToken("<|tool|>", normalized=False), AddedToken("[x]", lstrip=True, rstrip=True), "naïve"]
    )
    begin = ("</s>", tokenizer.token_to_id("</s>"))
    # not asked for
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[begin])
    tokenizer.encode_special_tokens = True
    return tokenizer


@pytest.fixture(scope="module", params=[(), (LLAMA_SPLIT,)], ids=["gpt2", "llama3"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(*request.param)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return make_tokenizer()


def reference(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def fuzzed(count: int) -> list[str]:
    drawn = random.Random(1)
    pieces = [*" ".join(HARD).split(" "), *HARD, "<|tool|>", "[x]", "naïve", "</s>", " ", "\n", "  "]
    return ["".join(drawn.choices(pieces, k=drawn.randint(1, 20))) for _ in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_are_those_of_the_reference(tokenizer: Tokenizer, backend: str) -> None:
    texts = [*fuzzed(300), "", *hard_texts(tokenizer)]
    ids = Encoder(tokenizer, backend=backend, check_every=0)(texts)
    assert [array.tolist() for array in ids] == reference(tokenizer, texts)
    assert all(array.dtype == np.uint32 and array.ndim == 1 for array in ids)
    assert max(array.max() for array in ids if len(array)) > 65_535


@pytest.mark.parametrize("backend", BACKENDS)
def test_control_tokens_stay_text_and_added_words_are_tokens(plain: Tokenizer, backend: str) -> None:
    encode = Encoder(plain, backend=backend)
    for special in ("<|endoftext|>", "<|im_start|>", "</s>"):
        ids = encode([f"a{special} b"])[0]
        assert plain.token_to_id(special) not in ids
        assert plain.decode(ids.tolist()) == f"a{special} b"
    tool, x, a, b = (plain.token_to_id(name) for name in ("<|tool|>", "[x]", "a", "b"))
    assert [ids.tolist() for ids in encode(["a<|tool|>b", "a  [x] \n b", ""])] == [
        [a, tool, b],
        [a, x, b],
        [],
    ]


FORK = """
import json, multiprocessing, os, sys
from tokenizers import Tokenizer
from trainer.data.encoder import Encoder

tokenizer = Tokenizer.from_str(sys.stdin.read())
tokenizer.encode_special_tokens = True
threads = len(os.listdir("/proc/self/task"))
encode = Encoder(tokenizer, backend=sys.argv[1], check_every=50)
texts = [f"the cat and the hat {i}, 'tis naïve " * 100 for i in range(60)]
encode(texts)
threads = len(os.listdir("/proc/self/task")) - threads
context = multiprocessing.get_context("fork")
results = context.Queue()
child = lambda: results.put([ids.tolist() for ids in encode(texts)])
for _ in range(2):
    context.Process(target=child, daemon=True).start()
right = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
print(json.dumps({"right": [results.get(timeout=250) == right for _ in range(2)], "new threads": threads}))
"""


@pytest.mark.parametrize(
    "backend", ["tokenizers", *(pytest.param(name, marks=pytest.mark.slow) for name in FAST)]
)
def test_parent_and_forked_children_encode(plain: Tokenizer, backend: str) -> None:
    command = [sys.executable, "-c", FORK, backend]
    env = os.environ | ({"TOKENIZERS_PARALLELISM": "false"} if backend in FAST else {})
    done = subprocess.run(command, input=plain.to_str(), env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["right"] == [True, True]
    assert backend == "tokenizers" or told["new threads"] == 0  # a fork would lose them


def test_a_number_of_any_length_is_encoded_by_the_fast_library() -> None:
    tokenizer = make_tokenizer(THREES, LLAMA_SPLIT)
    number = "7" * 20_000
    encode = Encoder(tokenizer, backend="fastokens", check_every=0)
    assert encode.fast(number).tolist() == reference(tokenizer, [number])[0]


def test_an_expression_that_the_libraries_read_differently_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data.backend=fastokens differs from tokenizers in .*; use data.backend=tokenizers"
    ):
        Encoder(make_tokenizer(WORD_END, LLAMA_SPLIT), backend="fastokens")


# ---- Libraries that are wrong, missing or refuse -----------------------------------------------------------


def fake(change: Callable[[str, list[int]], list[int]]) -> SimpleNamespace:
    """A library with the interface of fastokens that gives the reference's ids, changed."""

    def load(saved: str, **_: int) -> SimpleNamespace:
        tokenizer = Tokenizer.from_str(saved)
        tokenizer.encode_special_tokens = True

        def encode_batch_flat(texts: list[str], *, split_special_tokens: bool) -> tuple[bytes, bytes]:
            assert split_special_tokens
            return np.array(change(texts[0], reference(tokenizer, texts)[0]), np.uint32).tobytes(), b""

        return SimpleNamespace(encode_batch_flat=encode_batch_flat)

    return SimpleNamespace(Tokenizer=SimpleNamespace(from_json_str=load))


def use(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, list[int]], list[int]]) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", fake(change))


def wrong_on(word: str) -> Callable[[str, list[int]], list[int]]:
    return lambda text, ids: [*ids[:-1], 99] if word in text else ids


WRONG = {
    "last id dropped": lambda text, ids: ids[:-1],
    "one id too many": lambda text, ids: [*ids, 7],
    "line ends": lambda text, ids: ids[::-1] if "\r\n" in text else ids,
    "16 bits": lambda text, ids: [i % 65_536 for i in ids],
    "combining": wrong_on("\u0301"),
    "added token": wrong_on("[x]"),
    "100 kB": lambda text, ids: ids[:-1] if len(text) > 50_000 else ids,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_wrong_library_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, plain: Tokenizer, change: Callable
) -> None:
    use(monkeypatch, lambda text, ids: ids)
    Encoder(plain, backend="fastokens")
    use(monkeypatch, change)
    with pytest.raises(
        ValueError, match=r"data.backend=fastokens differs from tokenizers in .* use data.backend=tokenizers"
    ):
        Encoder(plain, backend="fastokens")


def test_the_difference_is_shown_on_a_short_piece(monkeypatch: pytest.MonkeyPatch, plain: Tokenizer) -> None:
    use(monkeypatch, wrong_on("zq"))
    encode = Encoder(plain, backend="fastokens")
    encode.check(["the cat"])
    z, q = (plain.token_to_id(letter) for letter in "zq")
    with pytest.raises(ValueError) as raised:
        encode.check(["the cat " * 1000 + "zq" + " and the hat" * 1000])
    assert f"in 'zq': at id 1 it has [{z}, 99] and not [{z}, {q}]; use data.backend=tokenizers" in str(
        raised.value
    )


def test_each_nth_text_is_checked(monkeypatch: pytest.MonkeyPatch, plain: Tokenizer) -> None:
    use(monkeypatch, wrong_on("zq"))
    good, bad = "cat", "zq"
    encode = Encoder(plain, backend="fastokens", check_every=3)
    encode([good, bad, bad, good])  # texts 0 and 3 are compared
    encode([])
    encode([bad, bad])
    with pytest.raises(RuntimeError, match=r"in 'zq': at id 1 .* use data.backend=tokenizers"):
        encode([bad])  # text 6
    never = Encoder(plain, backend="fastokens", check_every=0)
    assert [ids.tolist()[-1] for ids in never([bad] * 10)] == [99] * 10


def test_what_a_library_refuses_the_reference_encodes(
    monkeypatch: pytest.MonkeyPatch, plain: Tokenizer
) -> None:
    def refuse(word: str) -> Callable[[str, list[int]], list[int]]:
        def change(text: str, ids: list[int]) -> list[int]:
            if word in text:
                raise ValueError("stack limit")
            return ids

        return change

    use(monkeypatch, refuse("zq"))
    encode = Encoder(plain, backend="fastokens", check_every=1)
    assert [ids.tolist() for ids in encode(["cat", "zq"])] == reference(plain, ["cat", "zq"])
    use(monkeypatch, refuse(""))
    with pytest.raises(
        ValueError,
        match=r"data.backend=fastokens cannot encode '' \(stack limit\); use data.backend=tokenizers",
    ):
        Encoder(plain, backend="fastokens")


def test_unknown_and_missing_libraries_are_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, plain: Tokenizer
) -> None:
    with pytest.raises(
        ValueError,
        match=r"data.backend=fast is none of tokenizers, fastokens, gigatoken; use data.backend=tok",
    ):
        Encoder(plain, backend="fast")
    for backend in FAST:
        monkeypatch.setitem(sys.modules, backend, None)  # the import system's way to say that it is not there
        remedy = rf"pip install 'triquetra\[{backend}\]', or use data.backend=tokenizers"
        with pytest.raises(ValueError, match=rf"data.backend={backend} cannot be imported \(.*\); {remedy}"):
            Encoder(plain, backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_a_tokenizer_that_the_library_cannot_load_is_refused(backend: str) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(
        ValueError,
        match=rf"(?s)data.backend={backend} cannot load this tokenizer \(.+\); use data.backend=tok",
    ):
        Encoder(words, backend=backend)
    assert [ids.tolist() for ids in Encoder(words)(["cat dog"])] == [[2, 0]]
