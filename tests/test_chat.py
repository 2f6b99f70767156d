"""Do conversations become the tokens and labels that `transformers` makes of them, and can no message write a
turn?

Expected values come from `apply_chat_template`, from a slow parser of the tokens, or are counted by hand.
"""

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from tests.chats import (
    CONTROL,
    MARKS,
    OURS,
    SPLIT,
    TEMPLATES,
    TERSE,
    TOKENIZERS,
    assistant,
    byte_level,
    pieces_of,
    records,
    system,
    user,
    with_template,
    write_records,
)
from trainer.data import BadDocument, ChatSource
from trainer.data.chat import DIALOGUES
from trainer.data.conversation import Conversations, TemplateRefusal

# -- ids and masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_are_those_of_transformers(name: str, kind: str, special: bool) -> None:
    """Of all dialogues in which no message holds a control token. Where an answer ends with a letter of
    several tokens, `transformers` marks the first of them and we mark all: the only difference."""
    tokenizer = TOKENIZERS[kind](MARKS[name], special=special)
    theirs = with_template(tokenizer, TEMPLATES[name])
    ours = Conversations(tokenizer, TEMPLATES[name], names={"bos_token": "<s>"})
    num_equal = num_longer = 0
    for record in records():
        if any(mark in json.dumps(record, ensure_ascii=False) for mark in MARKS[name]):
            continue
        more = {"tools": record.get("tools"), "return_assistant_tokens_mask": True, "return_dict": True}
        expected = theirs.apply_chat_template(record["messages"], **more)
        ids, mask = ours(record["messages"], tools=record.get("tools"))
        assert ids.tolist() == expected["input_ids"]
        different = np.flatnonzero(mask != np.array(expected["assistant_masks"], bool))
        assert mask[different].all()
        for i in different.tolist():  # it is not the first token of its letter: it is no text by itself
            assert kind == "sentences" or "\ufffd" in tokenizer.decode([int(ids[i])])
        num_equal, num_longer = num_equal + (not len(different)), num_longer + (len(different) > 0)
    assert num_equal >= 290 and num_longer == (0 if name == "ours" else 5)


def slow_mask(tokenizer: Tokenizer, ids: list[int]) -> list[bool]:
    """Token by token: what follows <|im_start|>assistant and a line break, to <|im_end|> and with it."""
    start, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    mask, head, speaks = [], None, False
    for i in ids:
        mask.append(speaks)
        if i == start:
            head, speaks = [], False
        elif i == end:
            head, speaks = None, False
        elif head is not None and not speaks:
            head.append(i)
            speaks = tokenizer.decode(head) == "assistant\n"
    return mask


def test_the_mask_is_that_of_a_slow_parser() -> None:
    tokenizer = byte_level(CONTROL)
    ours, num_answers = Conversations(tokenizer, OURS), 0
    for record in records():
        ids, mask = ours(record["messages"], tools=record.get("tools"))
        assert mask.tolist() == slow_mask(tokenizer, ids.tolist())
        num_answers += sum(message["role"] == "assistant" for message in record["messages"])
        end = tokenizer.token_to_id("<|im_end|>")
        assert (ids[mask] == end).sum() == sum(m["role"] == "assistant" for m in record["messages"])
    assert num_answers > 400


def test_reasoning_stays_in_the_history_and_is_learned() -> None:
    answer = {**assistant("b"), "reasoning_content": "x"}
    tokenizer = byte_level(CONTROL)
    ids, mask = Conversations(tokenizer, OURS)([user("a"), answer, user("c"), assistant("d")])
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n"
    )
    learned = tokenizer.decode(ids[mask].tolist(), skip_special_tokens=False)
    assert learned == "<think>\nx\n</think>\n\nb<|im_end|>d<|im_end|>"
    inline = [user("a"), assistant("<think>\nx\n</think>\n\nb"), user("c"), assistant("d")]
    assert Conversations(tokenizer, OURS)(inline).ids.tolist() == ids.tolist()


def test_labels_of_the_last_turn_and_of_all_tokens() -> None:
    """A template with two stretches a turn, of which a turn may leave one empty."""
    tokenizer = byte_level(MARKS["split"])
    messages = [
        user("a"),
        {**assistant("b"), "reasoning_content": "x"},
        user("c"),
        assistant("dé"),
        user("e"),
    ]
    ids, mask = Conversations(tokenizer, SPLIT, labels="last")(messages)
    assert tokenizer.decode(ids[mask].tolist()) == "dé"
    assert Conversations(tokenizer, SPLIT, labels="all")(messages).mask is None
    ids, mask = Conversations(tokenizer, SPLIT)(messages)
    assert tokenizer.decode(ids[mask].tolist()) == "xbdé"


# -- nobody injects a turn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_message_holds_is_never_a_control_token(name: str, kind: str, special: bool) -> None:
    """Messages of whole control tokens and of their parts, in every place that holds text. The control tokens
    are those of the same conversation about nothing, and the text of all tokens is what the template wrote.
    """
    tokenizer = TOKENIZERS[kind](MARKS[name], special=special)
    ours = Conversations(tokenizer, TEMPLATES[name], names={"bos_token": "<s>"})
    written = [mark for mark in MARKS[name] if special or mark in TEMPLATES[name]]  # others are added words
    control = {tokenizer.token_to_id(mark) for mark in written}
    evil = [pieces_of(MARKS[name], seed=seed) for seed in range(160)]

    def conversation(texts: list[str]) -> tuple[list[dict], list[dict]]:
        a, b, c, d, e, f, g, h = texts
        parts = [{"type": "text", "text": b}, {"type": "text", "text": c}]
        call = {"type": "function", "function": {"name": d, "arguments": {e: f}}}
        messages = [
            system(a),
            user(parts if name == "ours" else b),
            {**assistant("." + c), "tool_calls": [call]},
        ]
        answer = {**assistant("." + g), "reasoning_content": "." + h}
        return [*messages, {"role": "tool", "content": d}, answer], [
            {"type": "function", "function": {"name": e}}
        ]

    messages, tools = conversation(["x"] * 8)
    harmless = [i for i in ours(messages, tools=tools).ids if i in control]
    for start in range(0, 160, 8):
        messages, tools = conversation(evil[start : start + 8])
        ids, _ = ours(messages, tools=tools)
        assert [i for i in ids if i in control] == harmless
        text = ours.render(messages, template=ours.template, tools=tools, names=ours.names)[0]
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False).strip() == text.strip()


def test_a_role_and_variables_write_no_turn() -> None:
    tokenizer = byte_level(CONTROL)
    template = "{{ extra }}{% generation %}{{ messages[0].content }}{% endgeneration %}<|im_end|>"
    ids, _ = Conversations(tokenizer, template)([user("a")], variables={"extra": "<|im_end|><|im_"})
    assert (ids == tokenizer.token_to_id("<|im_end|>")).sum() == 1


def test_a_message_and_the_template_make_no_control_token_together() -> None:
    tokenizer = byte_level(CONTROL)
    end = tokenizer.token_to_id("<|im_end|>")
    for before, content, after in (("", "<|im_", "end|>"), ("<|im_", "end|>", ""), ("<|im_", " end|>\n", "")):
        template = (
            f"{before}{{% generation %}}{{{{ messages[0].content | trim }}}}{{% endgeneration %}}{after}"
        )
        ids, mask = Conversations(tokenizer, template)([user(content)])
        assert end not in ids.tolist()
        assert tokenizer.decode(ids.tolist()) == "<|im_end|>" and tokenizer.decode(ids[mask].tolist()) != ""


def test_a_thought_may_begin_an_answer_and_stand_nowhere_else() -> None:
    tokenizer = byte_level(CONTROL)
    marks = [tokenizer.token_to_id(token) for token in ("<think>", "</think>")]
    content = "<think>a</think>b<think>c</think>"
    ids, _ = Conversations(tokenizer, OURS)([user(content), assistant(content)])
    assert [i for i in ids.tolist() if i in marks] == marks


# -- records ------------------------------------------------------------------------------------------------

GOOD = {"messages": [user("a"), assistant("b")]}
BAD = {
    "broken_json": (b'{"messages": [', "Expecting"),
    "broken_tools": ({**GOOD, "tools": "[{"}, "tools: Expecting"),
    "no_messages": ({"text": "a"}, "neither messages nor prompt and completion"),
    "no_object": (b"[]", "no object with messages"),
    "no_list": ({"messages": "a"}, "messages is no list of objects"),
    "number": ({"messages": [user(3), assistant("b")]}, "message 1: content is no text and no list"),
    "role": ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "message 2: role='bot' is none of"),
    "late_system": ({"messages": [user("a"), system("b")]}, "message 2: system where assistant may speak"),
    "two_users": ({"messages": [user("a"), user("b")]}, "message 2: user where assistant may speak"),
    "assistant_first": (
        {"messages": [assistant("b")]},
        "message 1: assistant where system or developer or user",
    ),
    "nobody": ({"messages": []}, "the assistant says nothing"),
    "no_answer": ({"messages": [system("s"), user("a")]}, "the assistant says nothing"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogates not allowed"),
    "noncharacter": ({"messages": [user("\ufdd0"), assistant("b")]}, "U.FDD0 is a noncharacter"),
    "blank": (b"", "the line is blank"),
}
KINDS = {
    "broken_json": "broken_json",
    "broken_tools": "broken_json",
    **dict.fromkeys(("no_messages", "no_object", "no_list", "number"), "missing_field"),
    **dict.fromkeys(("role", "late_system", "two_users", "assistant_first"), "turns"),
    **dict.fromkeys(("nobody", "no_answer"), "no_label"),
    **dict.fromkeys(("surrogate", "noncharacter"), "not_utf8"),
    "blank": "empty",
}


def bound(path: Path | None, tokenizer: Tokenizer, **options) -> ChatSource:
    source = ChatSource(None if path is None else str(path), **options)
    source.bind(tokenizer, None)
    return source


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_named_with_file_and_line(tmp_path: Path, case: str) -> None:
    row, detail = BAD[case]
    source = bound(write_records(tmp_path / "a.jsonl", [GOOD, row, GOOD]), byte_level(CONTROL))
    with pytest.raises(BadDocument, match=rf"a\.jsonl:2: {KINDS[case]}: .*{detail}"):
        source[1]
    assert len(source) == 3 and len(source[2].tokens) == len(source[0].tokens)


def test_prompts_and_completions_are_conversations(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": [user("a")], "completion": [assistant("b")]},
        {"prompt": None, "messages": [user("a"), {**assistant("b"), "tool_calls": None}]},
        {"messages": [user("a"), assistant("b")], "tools": "[]"},
    ]
    source = bound(write_records(tmp_path / "a.jsonl", rows), byte_level(CONTROL))
    ids = [source[i].tokens.tolist() for i in range(4)]
    assert ids[0] == ids[1] == ids[2] == ids[3] == source.bound(GOOD["messages"]).ids.tolist()


def test_parquet_and_datasets_hold_the_same_conversations(tmp_path: Path) -> None:
    """With what a column adds: every key in every row, null where a row has none."""
    rows = [{**record, "tools": json.dumps(record.get("tools", []))} for record in records()]
    for row in rows:
        for message in row["messages"]:
            for call in message.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    tokenizer = byte_level(CONTROL)
    lines = bound(write_records(tmp_path / "a.jsonl", rows), tokenizer)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=50)
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set" / "train.parquet")
    table = bound(tmp_path / "a.parquet", tokenizer)
    hub = ChatSource(name=str(tmp_path / "set"))
    hub.bind(tokenizer, None)
    assert len(table) == len(hub) == len(lines) == len(rows)
    for i in range(len(rows)):
        expected = lines[i]
        for source in (table, hub):
            document = source[i]
            assert document.tokens.tolist() == expected.tokens.tolist()
            assert document.mask.tolist() == expected.mask.tolist()
        assert table[i].where == f"{tmp_path / 'a.parquet'}:{i + 1}"


def test_a_directory_has_one_kind_of_files(tmp_path: Path) -> None:
    tokenizer = byte_level(CONTROL)
    (tmp_path / "set").mkdir()
    packed = gzip.compress(write_records(tmp_path / "a.jsonl", [GOOD, GOOD]).read_bytes())
    (tmp_path / "set" / "a.jsonl.gz").write_bytes(packed)
    assert len(bound(tmp_path / "set", tokenizer, cache_dir=str(tmp_path / "cache"))) == 2
    pq.write_table(pa.Table.from_pylist([GOOD]), tmp_path / "set" / "b.parquet")
    with pytest.raises(ValueError, match="set: there are Parquet and JSON lines; give one kind"):
        ChatSource(str(tmp_path / "set"))
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="no column 'messages'; field= is one of"):
        ChatSource(str(tmp_path / "b.parquet"))
    with pytest.raises(ValueError, match="are both set; set one of them to null"):
        ChatSource("a.jsonl", name="b")


def test_the_dialogues_that_ship_are_whole() -> None:
    source = bound(None, byte_level(CONTROL))
    documents = [source[i] for i in range(len(source))]
    assert len(documents) == len(DIALOGUES.read_text("utf-8").splitlines()) > 250
    assert all(document.mask.any() for document in documents)
    roles = Counter(m["role"] for i in range(len(source)) for m in source.records.record(i)[1]["messages"])
    assert min(roles[role] for role in ("system", "user", "assistant", "tool")) > 10


# -- at the door --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template": OURS.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")},
            "does not mark what",
        ),
        (
            {"template": "{% generation %}{% endgeneration %}<|end|>"},
            "the tokenizer has no <.end.>, which the chat",
        ),
        ({"template": "{% generation %}{{"}, "the chat template, line 1"),
        ({"labels": "mine"}, "labels=mine: must be one of assistant, last, all"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    if "template" in options:
        (tmp_path / "a.jinja").write_text(options["template"])
        options = {"template": str(tmp_path / "a.jinja")}
    with pytest.raises(ValueError, match=message):
        bound(None, byte_level(CONTROL), **options)


def test_a_tokenizer_without_the_control_tokens_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"no </think>, <think>, <.im_end.>, <.im_start.>.*data.control_tokens="
    ):
        bound(None, byte_level([]))
    source = ChatSource()
    with pytest.raises(ValueError, match="data.tokenizer=None: a conversation is text; name the tokenizer"):
        source.bind(None, None)
    with pytest.raises(ValueError, match="data.tokenizer=train: a tokenizer is not trained on conversations"):
        source[0]


def test_a_template_lies_beside_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = byte_level(MARKS["terse"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TERSE, "bos_token": {"content": "<s>"}})
    )
    source = ChatSource()
    source.bind(tokenizer, str(tmp_path))
    text = tokenizer.decode(source[1].tokens.tolist(), skip_special_tokens=False)
    assert text.startswith("<s>[USER]What is this project?[END][BOT]")
    (tmp_path / "chat_template.jinja").write_text(TERSE.replace("[BOT]", "[TOOL]"))
    before = source.fingerprint
    source.bind(tokenizer, str(tmp_path / "tokenizer.json"))
    assert source.fingerprint != before  # another template is another corpus


def test_a_template_that_refuses_a_conversation_says_why(tmp_path: Path) -> None:
    template = "a{{ raise_exception('no tools here') if tools }}{% generation %}b{% endgeneration %}"
    (tmp_path / "a.jinja").write_text(template)
    rows = [GOOD, {**GOOD, "tools": [{"type": "function", "function": {"name": "f"}}]}]
    source = bound(
        write_records(tmp_path / "a.jsonl", rows), byte_level(CONTROL), template=str(tmp_path / "a.jinja")
    )
    assert source[0].tokens is not None
    with pytest.raises(BadDocument, match="a.jsonl:2: turns: the chat template refuses it: no tools here"):
        source[1]
    with pytest.raises(TemplateRefusal):
        source.bound([{"role": "user"}], tools=[{"a": 1}])
