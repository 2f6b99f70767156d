"""How does text become token ids?"""

import logging
from collections.abc import Iterator, Sequence, Sized
from itertools import chain, count, takewhile
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from trainer.data.cache import cache_path, draft, hash_in_name, hash_of, keep, kept, reading, unwritable
from trainer.data.sources import BadDocument, Source, hashed, permutation

log = logging.getLogger(__name__)

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")
START_OF_TEXT = ("<|startoftext|>", "<|begin_of_text|>", "<s>", "<bos>", "<|bos|>")
PAD = ("<|pad|>", "<pad>", "<|padding|>", "[PAD]")

SAMPLE_MB = 6.0  # text that a tokenizer is trained on: 2 s on 2 idle cores for 32,768 entries (measured)
FORMAT = 1  # of the cached tokenizers: raise it when `train_tokenizer` changes


def load_tokenizer(
    spec: str | None,
    *,
    source: Source | dict[str, Source],
    vocab_size: int,
    cache_dir: str | Path | None = None,
    control_tokens: Sequence[str] = (),
) -> Tokenizer | None:
    """`spec`: "train" (on the source; of several, equally), a tokenizer.json, its directory, a hub name;
    None: no text. control_tokens: which it has besides its own.
    """
    if spec is None:
        return None
    is_trained, room = spec == "train", vocab_size - len(control_tokens)
    tokenizer = cached_tokenizer(source, room, cache_dir) if is_trained else ready_tokenizer(spec)
    new = [token for token in control_tokens if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens(new)
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > vocab_size:
        more = f" with data.control_tokens={new}" if new else ""
        raise ValueError(
            f"data.tokenizer={spec}{more} needs model.vocab_size={needed}, which is {vocab_size}"
        )
    end_of_text_id(tokenizer)
    tokenizer.encode_special_tokens = True  # text that looks like a control token stays text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def ready_tokenizer(spec: str) -> Tokenizer:
    """Of a tokenizer.json, its directory or a hub name. Raises: ValueError."""
    try:
        path = Path(spec).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        return Tokenizer.from_file(str(file)) if path.exists() else Tokenizer.from_pretrained(spec)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises bare Exceptions, and panics are none of them
        remedy = "give train, a tokenizer.json, its directory or a hub name (network, HF_HUB_OFFLINE?)"
        raise ValueError(f"data.tokenizer={spec}: cannot load it ({error}); {remedy}") from error


def end_of_text_id(tokenizer: Tokenizer) -> int:
    ids = [tokenizer.token_to_id(name) for name in END_OF_TEXT]
    present = [i for i in ids if i is not None]
    if not present:
        raise ValueError(f"the tokenizer has no end-of-text token; looked for {', '.join(END_OF_TEXT)}")
    return present[0]


def roles(tokenizer: Tokenizer) -> dict[str, tuple[str, int]]:
    """{"eos": (token, id)}, and "bos" and "pad" where a special token has a name that says so."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    named = {"bos": START_OF_TEXT, "pad": PAD}
    tokens_of = {
        role: [(name, special[name]) for name in names if name in special] for role, names in named.items()
    }
    end = end_of_text_id(tokenizer)
    return {
        "eos": (str(tokenizer.id_to_token(end)), end),
        **{role: candidates[0] for role, candidates in tokens_of.items() if candidates},
    }


def cached_tokenizer(
    source: Source | dict[str, Source], vocab_size: int, cache_dir: str | Path | None
) -> Tokenizer:
    """The tokenizer trained on this source or these: the one in the cache if it is what was written there,
    else trained now. Training is deterministic. Raises: CacheError.
    """
    if isinstance(source, dict):
        prints = {name: part.fingerprint for name, part in source.items()}
    else:
        prints = source.fingerprint
    name = f"tokenizer-{hashed(prints, vocab_size, tokenizers.__version__, FORMAT)}"
    cache = cache_path(cache_dir)
    copies = kept(cache, name)
    for copy in copies:
        with reading(copy):
            content = copy.read_bytes()
        if hash_of(content) == hash_in_name(copy):
            return Tokenizer.from_str(content.decode())
    for copy in copies:
        log.warning("%s is not what was written there; the tokenizer is trained again", copy)
    with draft(cache, name) as target:  # opened first: training takes long
        content = train_tokenizer(source, vocab_size).to_str(pretty=True).encode()
        try:
            target.write_bytes(content)
            keep(target, name, hash_of(content), suffix=".json")
        except OSError as error:
            raise unwritable(cache, error) from error
    return Tokenizer.from_str(content.decode())


def train_tokenizer(source: Source | dict[str, Source], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: 256 bytes, the end of text (id 0) and merges, `vocab_size` entries exactly."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT[0]],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    parts = list(source.values()) if isinstance(source, dict) else [source]
    texts = chain.from_iterable(sample(part, size_mb=SAMPLE_MB / len(parts)) for part in parts)
    tokenizer.train_from_iterator(texts, trainer)
    size = tokenizer.get_vocab_size()
    if size != vocab_size:
        remedy = f"use model.vocab_size={size}" if size > 257 else "use a larger vocabulary or corpus"
        raise ValueError(f"model.vocab_size={vocab_size}: the corpus gives a vocabulary of {size}; {remedy}")
    return tokenizer


def sample(source: Source, *, size_mb: float) -> Iterator[str]:
    """The first of its text, in a fixed order: the tokenizer must not depend on the run's seed."""
    remaining = int(size_mb * 1e6)
    once = takewhile(lambda i: i < (source.num_rows or i + 1), count())  # of a stream that begins again
    for i in permutation(len(source), seed=0, epoch=0).tolist() if isinstance(source, Sized) else once:
        try:
            text = source[i].text
        except BadDocument:
            continue
        if text is None:
            raise ValueError("data.tokenizer=train needs text, the source gives tokens; use null")
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return
