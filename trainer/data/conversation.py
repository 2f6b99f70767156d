"""What does a conversation look like as tokens, and which of them does the assistant say?

    messages --hidden--> template (Jinja, `transformers`' sandbox) --renamed--> text --tokenizer--> ids, mask

The template of the tokenizer writes the turns. What messages hold stays text, also where it looks like a
control token: so nobody injects a turn. Before rendering a mark goes into everything in a message that could
be read as a control token; what the template wrote itself then gets a private name, the marks come out, and a
copy of the tokenizer that knows control tokens by these names alone encodes the whole text at once. Where no
message holds a control token the ids are those of `apply_chat_template`.

Control tokens are the special tokens of the tokenizer, and its other added tokens that the template writes.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trainer.data.sources import Tokens

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
LABELS = ("assistant", "last", "all")
# Noncharacters of Unicode, which no text may hold: a mark, and the letters of private names.
MARK, NAME_START, DIGITS = "\ufdef", "\ufdd0", "".join(map(chr, range(0xFDD1, 0xFDE1)))
RESERVED = re.compile(f"[{NAME_START}-{MARK}]")
NAME_DIGITS = 5  # to the base of 16: no tokenizer has a million control tokens
THOUGHT = re.compile(r"(\s*)<think>(.*?)</think>", re.DOTALL)
NEEDED = re.compile(r"<\|\w+\|>|</?think>")  # what a template writes and must be one token
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")
REMEDY = "pip install 'triquetra[chat]'"


class TemplateRefusal(ValueError):
    """The template does not take these messages; its own message says why."""


class Conversations:
    """Messages to tokens by one tokenizer and one template. Raises: ValueError where they do not fit.

    labels: "assistant": what every turn of the assistant says; "last": the last one; "all": every token.
    names: what a template may call by name, like eos_token.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, *, labels: str = "assistant", names: Mapping[str, str] = {}
    ) -> None:
        if labels not in LABELS:
            raise ValueError(f"labels={labels}: must be one of {', '.join(LABELS)}")
        if labels != "all" and not GENERATION.search(template):
            marks = "{% generation %} ... {% endgeneration %}"
            raise ValueError(
                f"the chat template does not mark what the assistant says; write {marks} around it, give "
                "template= another one, or use labels=all"
            )
        self.template, self.labels, self.names = template, labels, dict(names)
        self.render = renderer()
        self.render([{"role": "user", "content": ""}], template=template, names=self.names, strict=False)
        refuse_missing(tokenizer, template)
        control = control_tokens(tokenizer, template)
        self.marks = re.compile("|".join(filter(None, [MARK, either(control)])))
        self.name_of = {token: private_name(i) for i, token in enumerate(sorted(control))}
        self.hidden = hiding(control)
        self.tokenizer = renamed(tokenizer, self.name_of)

    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, variables: Mapping[str, Any] = {}
    ) -> Tokens:
        """variables: of the template, like enable_thinking. Raises: TemplateRefusal."""
        hidden = [self.hidden_message(message) for message in messages]
        more = {"tools": self.hide(tools), "names": {**self.names, **self.hide(dict(variables))}}
        text, spans = self.render(hidden, template=self.template, **more)
        if self.labels == "last":
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            spans = spans[len(self.render(hidden[:last], template=self.template, **more)[1]) if last else 0 :]
        text, spans = self.named(text, spans)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.uint32)
        return Tokens(ids, None if self.labels == "all" else within(encoding.offsets, spans))

    def hide(self, value: Any) -> Any:
        """The same with marks in every text that could be read as a control token, or as a part of one."""
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, Mapping):
            return {self.hidden(key): self.hide(one) for key, one in value.items()}
        return [self.hide(one) for one in value] if isinstance(value, Sequence) else value

    def hidden_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The assistant's content may begin with a thought, whose marks are control tokens."""
        hidden, content = self.hide(message), message.get("content")
        if message["role"] == "assistant" and isinstance(content, str) and (match := THOUGHT.match(content)):
            before, thought = match.groups()
            after = self.hidden(content[match.end() :])
            hidden["content"] = f"{before}<think>{self.hidden(thought)}</think>{after}"
        return hidden

    def named(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """The text with private names and without marks, and where the spans lie in it."""
        parts, ends, shifts, done = list[str](), [0], [0], 0
        for match in self.marks.finditer(text):
            name = self.name_of.get(match[0], "")
            parts += [text[done : match.start()], name]
            done = match.end()
            ends.append(done)
            shifts.append(shifts[-1] + len(name) - len(match[0]))
        parts.append(text[done:])
        moved = [tuple(place + shifts[bisect_right(ends, place) - 1] for place in span) for span in spans]
        return "".join(parts), moved


def within(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens have a letter in a span."""
    start_T, end_T = np.array(offsets, np.int64).reshape(-1, 2).T
    mask_T = np.zeros(len(start_T), bool)
    for start, end in spans:
        mask_T |= (start_T < end) & (end_T > start)
    return mask_T


# -- the template ------------------------------------------------------------------------------------------


def renderer() -> Any:
    """messages -> text, and where in it the assistant speaks. Raises: ValueError without `transformers`."""
    try:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError as error:
        raise ValueError(f"a chat template needs transformers and jinja2 ({error}); {REMEDY}") from error

    def render(
        messages: list[dict], *, template: str, tools: Any = None, names: dict, strict: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            [text], spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=GENERATION.search(template) is not None,
                **names,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template, line {error.lineno}: {error}") from error
        except ImportError as error:  # a jinja2 that is too old
            raise ValueError(f"{error}; {REMEDY}") from error
        except Exception as error:  # a template may do anything to messages that it was not written for
            if not strict:
                return "", []
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error
        return text, spans[0] if spans else []

    return render


def own_template(spec: str | None) -> tuple[str | None, dict[str, str]]:
    """The chat template that lies beside a tokenizer, and what its special tokens are called. Raises:
    ValueError.
    """
    if spec is None or spec == "train":
        return None, {}
    path = Path(spec).expanduser()
    if not path.exists():
        return of_hub(spec)
    folder = path if path.is_dir() else path.parent
    settings, file = folder / "tokenizer_config.json", folder / TEMPLATE.name
    try:
        values = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
        template = file.read_text("utf-8") if file.is_file() else chosen(values.get("chat_template"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: its chat template cannot be read ({error})") from error
    tokens = {key: value for key, value in values.items() if key.endswith("_token")}
    named = {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
    return template, {key: value for key, value in named.items() if isinstance(value, str)}


def chosen(template: Any) -> str | None:
    """Several templates have names; the one of no special use is called default."""
    if isinstance(template, list):
        return next((one["template"] for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def of_hub(spec: str) -> tuple[str | None, dict[str, str]]:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(spec)
    except Exception as error:  # a dozen kinds: no network, no such name, no access
        raise ValueError(f"data.tokenizer={spec}: its chat template cannot be fetched ({error})") from error
    return chosen(tokenizer.chat_template), dict(tokenizer.special_tokens_map)


# -- the tokenizer -----------------------------------------------------------------------------------------


def refuse_missing(tokenizer: Tokenizer, template: str) -> None:
    """Raises: ValueError if the template writes control tokens that the tokenizer does not have."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = sorted(set(NEEDED.findall(template)) - added)
    if missing:
        tokens = ", ".join(f"'{token}'" for token in missing)
        raise ValueError(
            f"the tokenizer has no {', '.join(missing)}, which the chat template writes; add them with "
            f'"data.control_tokens=[{tokens}]", and as many rows with model.vocab_size'
        )


def control_tokens(tokenizer: Tokenizer, template: str) -> set[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    control = {
        token.content
        for token in added
        if token.special or (token.content.strip() and token.content in template)
    }
    if short := sorted(token for token in control if len(token) < 2):
        raise ValueError(f"the tokenizer has the control token {short[0]!r}, which is a letter of any text")
    return control


def hiding(control: set[str]) -> Callable[[str], str]:
    """text -> the same with a mark in each control token, and where its start or its end, also without white
    space, could be a part of one: so it makes none with what the template sets beside it.
    """
    if not control:
        return lambda text: text
    starts = {token[:i] for token in control for i in range(1, len(token))}
    ends = {token[i:] for token in control for i in range(1, len(token))}
    longest = max(map(len, control)) - 1
    each = re.compile(f"(?={either(control)}).", re.DOTALL)  # also of those that overlap

    def hide(text: str) -> str:
        body = text.strip()
        if any(body[-n:] in starts for n in range(1, longest + 1)):
            end = len(text.rstrip())
            text = text[:end] + MARK + text[end:]
        if any(body[:n] in ends for n in range(1, longest + 1)):
            start = len(text) - len(text.lstrip())
            text = text[:start] + MARK + text[start:]
        return each.sub(lambda match: match[0] + MARK, text)

    return hide


def either(tokens: set[str]) -> str:
    """A pattern of the longest of them that fits."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def private_name(number: int) -> str:
    digits = (DIGITS[number // 16**place % 16] for place in reversed(range(NAME_DIGITS)))
    return NAME_START + "".join(digits)


def renamed(tokenizer: Tokenizer, name_of: Mapping[str, str]) -> Tokenizer:
    """A copy that knows these tokens by other names, and has the same ids. Raises: ValueError."""
    content = json.loads(tokenizer.to_str())
    # offsets are those of whole tokens, and nothing is added or cut
    content |= {"post_processor": None, "truncation": None, "padding": None}
    for token in content["added_tokens"]:
        token["content"] = name_of.get(token["content"], token["content"])
    model = content["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {name_of.get(token, token): i for token, i in vocab.items()}
    else:
        model["vocab"] = [[name_of.get(token, token), score] for token, score in vocab]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = name_of.get(model["unk_token"], model["unk_token"])
    copy = Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = False
    wrong = [
        token for token, name in name_of.items() if copy.token_to_id(name) != tokenizer.token_to_id(token)
    ]
    if wrong:
        raise ValueError(f"the tokenizer cannot be copied: {wrong[0]} has another id in the copy")
    return copy


def strings(value: Any) -> Iterator[str]:
    """All texts in nested lists and dicts, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, Sequence):
        for one in value:
            yield from strings(one)
