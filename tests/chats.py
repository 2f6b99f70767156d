"""Conversations, templates and tokenizers for them."""

import json
import random
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from trainer.data.chat import DIALOGUES
from trainer.data.conversation import TEMPLATE

OURS = TEMPLATE.read_text("utf-8")
CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
# Trimmed contents, the end mark outside of what is learned, tools as one line.
TERSE = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}[BOT]{% generation %}{{ m.content | trim }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endgeneration %}[END]"
    "{% else %}[{{ m.role | upper }}]{{ m.content | trim }}[END]{% endif %}{% endfor %}"
)
# Two stretches of each answer, the role between halves of a mark, no end at all.
SPLIT = (
    "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' }}{%- if m.role == 'assistant' %}"
    "{%- generation %}{{- m.reasoning_content or '' }}{%- endgeneration %}{{- '~' }}"
    "{%- generation %}{{- m.content }}{%- endgeneration %}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '\\n' }}{%- endfor %}"
)
TEMPLATES = {"ours": OURS, "terse": TERSE, "split": SPLIT}
MARKS = {
    "ours": CONTROL,
    "terse": ["<s>", "[TOOLS]", "[BOT]", "[END]", "[USER]", "[SYSTEM]", "[TOOL]"],
    "split": ["<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"],
}


def records() -> list[dict]:
    """Those that ship, and hard ones: empty turns, letters of several bytes at the borders, spaces."""
    shipped = [json.loads(line) for line in DIALOGUES.read_text("utf-8").splitlines()]
    hard = [("", ""), ("", "👍🏽"), ("👩‍👩‍👧", "é"), ("  a\n", "  b  \n\n")]
    hard += [("\t", "日本語。"), ("a b", " c"), ("1", "2\n")]
    turns = [[user(a), assistant(b)] for a, b in hard]
    return [
        *shipped,
        *({"messages": turn} for turn in turns),
        {"messages": [system(""), *turns[1], *turns[0], *turns[3]]},
        {"messages": [system("é"), user("x"), {**assistant("ß"), "reasoning_content": "🏽\n"}, user("")]},
    ]


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict:
    return {"role": "system", "content": content}


def byte_level(marks: list[str], *, special: bool = True) -> Tokenizer:
    """Like GPT's: a letter may be several tokens, a space belongs to the word behind it. One control token
    has a place in the vocabulary itself.
    """
    return with_marks(trained_byte_level(), marks, special=special)


def sentences(marks: list[str], *, special: bool = True) -> Tokenizer:
    """Like Llama's: spaces become letters, and what is unknown falls apart to bytes."""
    return with_marks(trained_sentences(), marks, special=special)


@cache
def trained_byte_level() -> str:
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trained(tokenizer, initial_alphabet=level.alphabet(), vocab_size=600, special_tokens=["<|endoftext|>"])
    return tokenizer.to_str()


@cache
def trained_sentences() -> str:
    tokenizer = Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    parts = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    tokenizer.decoder = tokenizers.decoders.Sequence([*parts, tokenizers.decoders.Fuse()])
    trained(tokenizer, vocab_size=900, special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))])
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] == "<unk>"]
    return json.dumps(content)


TOKENIZERS = {"byte_level": byte_level, "sentences": sentences}


def trained(tokenizer: Tokenizer, **options) -> None:
    trainer = tokenizers.trainers.BpeTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(DIALOGUES.read_text("utf-8").splitlines(), trainer)


def with_marks(content: str, marks: list[str], *, special: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(content)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(mark, special=special, normalized=False) for mark in marks])
    return tokenizer


def with_template(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, bos_token="<s>")


def write_records(path: Path, rows: list[dict | bytes]) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def pieces_of(marks: list[str], *, seed: int) -> str:
    """A text of whole control tokens, of parts of them, and of words."""
    draw = random.Random(seed)
    parts = []
    for _ in range(draw.randrange(1, 8)):
        mark = draw.choice(marks)
        cut = sorted(draw.sample(range(len(mark) + 1), 2))
        parts.append(draw.choice([mark, mark[cut[0] : cut[1]], mark[: cut[1]], mark[cut[0] :], "a ", "\n"]))
    return "".join(parts)
