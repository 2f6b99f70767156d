"""How do texts become token ids fast, and who says that the ids are right?

`tokenizers` does. A faster library must give its ids on the hard texts below before the first step, and on a
sample ever after.
"""

import importlib
import json
import os
import random
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import numpy as np
import tokenizers

REMEDY = "use data.backend=tokenizers"


class Encoder:
    """Text to token ids, by `tokenizers` or a faster library that was seen to give the same.

    It may be used before a fork and in the children, which share what the parent has loaded: the fast
    libraries start no thread here. `check_every`: one of so many texts of a process is encoded by both
    libraries; 0: none.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, backend: str = "tokenizers", check_every: int = 1000
    ) -> None:
        self.tokenizer, self.backend, self.check_every = tokenizer, backend, check_every
        self.num_texts = 0
        self.fast = self.right if backend == "tokenizers" else loaded(backend, tokenizer)
        self.check(hard_texts(tokenizer))

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint32 ids of each text, without an end of text; the arrays may be read-only."""
        if self.backend == "tokenizers":
            return self.reference(texts)
        ids = [self.encoded(text) for text in texts]
        if self.check_every:
            for i in range(-self.num_texts % self.check_every, len(texts), self.check_every):
                if wrong := self.wrong(texts[i], ids[i]):
                    raise RuntimeError(wrong)
            self.num_texts += len(texts)
        return ids

    def reference(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            np.array(e.ids, np.uint32)
            for e in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def right(self, text: str) -> np.ndarray:
        return self.reference([text])[0]

    def encoded(self, text: str) -> np.ndarray:
        try:
            return self.fast(text)
        except (
            ValueError,
            RuntimeError,
        ):  # it says so itself, as where a regex runs out of stack: the data stays the same
            return self.right(text)

    def check(self, texts: Iterable[str]) -> None:
        """Raises ValueError where the ids of one of these texts, shortest first, are not the reference's."""
        for text in sorted(texts, key=len) if self.backend != "tokenizers" else ():
            try:
                ids = self.fast(text)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"data.backend={self.backend} cannot encode {text!r:.200} ({error}); {REMEDY}"
                ) from error
            if wrong := self.wrong(text, ids):
                raise ValueError(wrong)

    def wrong(self, text: str, ids: np.ndarray) -> str:
        """How `ids` differ from the reference's, told of the shortest piece found that differs; empty: they
        do not.
        """
        right = self.right(text)
        if np.array_equal(ids, right):
            return ""
        half = len(text) // 2
        for piece in (text[:half], text[half:], text[half // 2 :][:half]) if half else ():
            if shorter := self.wrong(piece, self.encoded(piece)):
                return shorter
        both = min(len(ids), len(right))
        at = int(np.append(ids[:both] != right[:both], True).argmax())
        near = slice(max(at - 3, 0), at + 5)
        return (
            f"data.backend={self.backend} differs from tokenizers in {text!r:.200}: at id {at} it "
            f"has {ids[near].tolist()} "
            f"and not {right[near].tolist()}; {REMEDY}"
        )


def loaded(backend: str, tokenizer: tokenizers.Tokenizer) -> Callable[[str], np.ndarray]:
    if backend not in FAST:
        raise ValueError(f"data.backend={backend} is none of tokenizers, {', '.join(FAST)}; {REMEDY}")
    try:
        library = importlib.import_module(backend)
    except ImportError as error:
        remedy = f"pip install 'triquetra[{backend}]', or {REMEDY}"
        raise ValueError(f"data.backend={backend} cannot be imported ({error}); {remedy}") from error
    try:
        return FAST[backend](library, tokenizer)
    except Exception as error:  # of their own kinds
        raise ValueError(f"data.backend={backend} cannot load this tokenizer ({error}); {REMEDY}") from error


def fastokens(library: ModuleType, tokenizer: tokenizers.Tokenizer) -> Callable[[str], np.ndarray]:
    # read at its first text: a fork could leave a lock of its threads shut
    os.environ["FASTOKENS_BPE_THREADS"] = "1"
    # [bytes] with its own, a regex with a look-ahead fails at 15,000 digits in a row (measured)
    jit_stack = 1 << 26
    fast = library.Tokenizer.from_json_str(tokenizer.to_str(), pcre2_max_jit_stack_size=jit_stack)
    return lambda text: np.frombuffer(fast.encode_batch_flat([text], split_special_tokens=True)[0], np.uint32)


def gigatoken(library: ModuleType, tokenizer: tokenizers.Tokenizer) -> Callable[[str], np.ndarray]:
    config = json.loads(tokenizer.to_str())
    # unknown to it, they are text
    config["added_tokens"] = [token for token in config["added_tokens"] if not token["special"]]
    # one text at a time: `encode_batch` hangs after a fork
    return library.Tokenizer.from_json(json.dumps(config)).encode


FAST = {"fastokens": fastokens, "gigatoken": gigatoken}

HARD = (
    "",
    " ",
    "\n",
    "a",
    "\x00",
    "a\x00\x00b \x00",
    "\ufeffmark",
    "  two   three    four ",
    "\ttabs \t\t mixed\t ",
    "\n\n\nlines\n \n  \n",
    "dos\r\nline\r\n\r\n  end\r",
    "\xa0no\u2003em\u3000wide\u2028line\u200bzero \x85\x0b\x0c\x1f",
    "1 12 123 1234 1234567 12345678901234567890",
    "3.14 1,234.5 -1e-9 0x1F ١٢٣٤ ४५६७ ²³ Ⅻ ½ 1234½ 6666↉ 4444⅙⅙x",
    "I'm you're WE'VE they'D he'll it's can’t 'tis 's 't 'ſ '",
    "!?... --- $%^&*() ([{}]) \"'`~ __a__ // => <=",
    "<|endoftext|></s> <eos><|eos|> <s><pad>[CLS] <|im_start|>x<|",
    "Grüße naïve Straße ſßẞ İı Æ ŉ",
    "Привет Ελληνικά ქართ ʰª ǅ",
    "e\u0301 a\u0323\u0308 \u0301 x\u0361\u035f\u0489\u0336",
    "日本語とカタカナ 中文。한국어 \u1112\u1161\u11ab 漢abc字1",
    "ภาษาไทย हिन्दी தமிழ்",
    "مرحبا שלום \u202eright\u202c \u200fabc\u200e",
    "\ue000\uf8ff\U000f0000\U0010fffd \ufffd\uffff 𝔘ﬁ Ａ１",
    "👍👍🏽 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈🇩🇪🇫 1\ufe0f\u20e3 ☺ \U0001f9ff\U00010348",
    "CamelCaseXMLRequest snake_case mIxEd",
    "def f(x):\n    return {\n\t'a': 1,  # x\n    }\n\n\n",
    "https://a.org/b?c=d&e=%20#f C:\\x",
)
# very long words and the like
RUNS = ("a", "xyz", "E", "é", "漢", "0", "=", " ", "\n", " \n", "\r\n", "'s", "🏽", "\u0301")


def hard_texts(tokenizer: tokenizers.Tokenizer) -> list[str]:
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    beside = [f"a{token}b {token}  {token}\n{token}{token}" for token in added]
    drawn = random.Random(0)
    mixed = ["".join(drawn.choices(" ".join(HARD), k=30)) for _ in range(300)]
    line = ("".join(" ".join(HARD).splitlines()) * 200).encode()[:100_000].decode(errors="ignore")
    return [*HARD, *added, *beside, "".join(added), *mixed, *(run * 1000 for run in RUNS), line]
