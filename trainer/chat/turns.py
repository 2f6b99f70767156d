"""What does a conversation look like to the model, and what ends its answer?

The template is that of the tokenizer, which fine-tuning has rendered too. Without one it is the default,
trainer/data/chat_template.jinja; where the tokenizer lacks the marks of the default, turns are plain lines,
"user: ..." and "assistant:", and the answer ends where the model begins a turn of the user.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from trainer.data.conversation import (
    RESERVED,
    TEMPLATE,
    Conversations,
    TemplateRefusal,
    own_template,
    refuse_missing,
)
from trainer.weights.texts import end_of_turn

PLAIN = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
NO_TEXT = re.compile(f"{RESERVED.pattern}|[\ud800-\udfff]")  # the second: bytes that are not UTF-8
PLAIN_STOP = "\nuser:"
NOT_TUNED = "it was not fine-tuned to answer (docs/after_pretraining.md), so expect it to go on with the text"


class Turns:
    """Messages to ids by one tokenizer.

    note: which template stands in for a missing one, or None. stops: ids that end an answer. stop_text: what
    ends it where turns have no control tokens.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, template_file: Path | None) -> None:
        """Raises: ValueError."""
        own, names = own_template(str(directory))
        template = own if template_file is None else template_file.read_text("utf-8")
        self.note, self.stop_text = None, None
        if template is None:
            template, self.note = default_for(tokenizer)
            self.stop_text = PLAIN_STOP if template == PLAIN else None
        self.conversations = Conversations(tokenizer, template, labels="all", names=names)
        turn = end_of_turn(tokenizer, template)
        self.stops = {turn[1]} if turn else set()

    def ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Up to where the assistant speaks. Raises: TemplateRefusal."""
        if any(NO_TEXT.search(str(message["content"])) for message in messages):
            raise TemplateRefusal("it has characters that no text may hold")
        return self.conversations(messages, variables={"add_generation_prompt": True}).ids.tolist()


def default_for(tokenizer: Tokenizer) -> tuple[str, str]:
    """A template, and a note that says which."""
    template = TEMPLATE.read_text("utf-8")
    try:
        refuse_missing(tokenizer, template)
    except ValueError:
        return PLAIN, f"no chat template and no control tokens: turns are plain lines; {NOT_TUNED}"
    return template, f"no chat template: the default is used, {TEMPLATE.name}; {NOT_TUNED}"
