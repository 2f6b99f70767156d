"""How does a person talk to a model?

    triquetra chat runs/sft                  its newest checkpoint, exported into runs/sft/exports once
    triquetra chat out                       an export; owner/name: one of the hub
    triquetra chat runs/sft --system "You are brief." --temperature 0

    /reset       forget the conversation       /save FILE   add it to FILE, a line that data=chat reads
    /help        these lines                   /exit        end; Ctrl-D too
    Ctrl-C       stop the answer

Where stdin is no terminal, each line is a message, and stdout holds the answers alone. A message that begins
with / is written with a blank before it.

Exit codes: 0 ended · 1 the checkpoint is damaged · 2 refused · 130 interrupted before the first message.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from unicodedata import category

from trainer import terminal
from trainer.chat.options import CODES, Ready, parser_of, ready
from trainer.chat.turns import Turns
from trainer.data.conversation import TemplateRefusal

OK = 0
DIM = "\x1b[2m{}\x1b[0m"
COMMANDS = """/reset       forget the conversation
/save FILE   add the conversation to FILE, a line that data=chat reads
/help        these lines
/exit        end; Ctrl-D too
Ctrl-C       stop the answer"""


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(partial(command, arguments), CODES)


def command(arguments: list[str] | None) -> int:
    options = parsed(arguments)
    model = ready(options)
    turns = Turns(model.origin.directory, model.speaker.tokenizer, options.template)
    step = "" if model.origin.step is None else f", step {model.origin.step}"
    note(f"{model.origin.name}{step}: {model.speaker}; /help says what else there is")
    if turns.note:
        note(f"note: {turns.note}")
    Chat(model, turns, system=options.system).run()
    return OK


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Raises: ConfigError."""
    parser = parser_of("chat", str(__doc__), temperature=0.7, top_p=0.95, max_tokens=1024)
    parser.add_argument("--seed", type=int, help="of the draw; without it answers differ each time")
    return parser.parse_args(arguments)


def note(text: str) -> None:
    """What is not said by the model stands on stderr."""
    print(text, file=sys.stderr, flush=True)


class Chat:
    """One conversation with one model."""

    def __init__(self, model: Ready, turns: Turns, *, system: str | None) -> None:
        self.model, self.turns = model, turns
        self.beginning = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.beginning)
        self.is_long = False
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda rest: note(COMMANDS),
        }

    def run(self) -> None:
        """Until the input ends."""
        for line in lines():
            name, _, rest = line.strip().partition(" ")
            if name == "/exit":
                return
            if line.startswith("/"):
                self.commands.get(name, partial(unknown, name))(rest.strip())
            elif line.strip():
                self.ask(line.strip())

    def ask(self, text: str) -> None:
        """Says the answer. What was interrupted stays in the conversation as far as it came."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.turns.ids(self.messages)
        except TemplateRefusal as error:
            self.messages.pop()
            note(f"the chat template refuses it: {error}")
            return
        self.warn_of_length(len(ids))
        speaker = self.model.speaker
        screen = Screen()
        spoken = speaker.spoken(screen.say, stops=self.turns.stops, stop_text=self.turns.stop_text)
        try:
            speaker.speak(ids, self.model.draw, spoken)
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
        finally:
            screen.end()
        if spoken.end_reason == "length":
            note(f"(cut after {len(spoken.ids)} tokens; --max-tokens allows more)")
        self.messages.append({"role": "assistant", "content": spoken.text.strip()})

    def warn_of_length(self, num_tokens: int) -> None:
        trained = self.model.speaker.trained_length
        if trained is not None and num_tokens > trained and not self.is_long:
            note(f"note: {num_tokens} tokens by now, and the model was trained on rows of {trained}; /reset")
            self.is_long = True

    def reset(self, rest: str) -> None:
        self.messages, self.is_long = list(self.beginning), False
        note("the conversation begins anew")

    def save(self, rest: str) -> None:
        if not rest:
            note("/save needs a file: /save FILE")
            return
        path = Path(rest).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            note(f"cannot save: {error}")
            return
        note(f"{len(self.messages)} messages added to {path}")


def unknown(name: str, rest: str) -> None:
    note(f"{name} is no command; /help has them (a message may begin with / behind a blank)")


def lines() -> Iterator[str]:
    """What is typed or piped in, line by line."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() then edits and remembers lines
    while True:
        try:
            yield input("> " if sys.stdout.isatty() else "") if is_terminal else next_line()
        except (EOFError, OSError):  # the terminal is gone, too
            if is_terminal:
                note("")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            note("\n(Ctrl-D or /exit ends)")
        except UnicodeDecodeError as error:
            note(f"not UTF-8: {error}")


def next_line() -> str:
    """Raises: EOFError."""
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line


class Screen:
    """stdout, where a model speaks. In a terminal thoughts are dim, and nothing that is said steers it."""

    def __init__(self) -> None:
        self.is_terminal, self.is_thinking, self.is_empty = sys.stdout.isatty(), False, True
        self.has_styles = (
            self.is_terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        )

    def say(self, text: str) -> None:
        text = text.lstrip() if self.is_empty else text
        self.is_empty &= not text
        self.is_thinking |= "<think>" in text
        shown = harmless(text) if self.is_terminal else text
        print(DIM.format(shown) if self.is_thinking and self.has_styles else shown, end="", flush=True)
        self.is_thinking &= "</think>" not in text

    def end(self) -> None:
        print(flush=True)


def harmless(text: str) -> str:
    """Without the letters that steer a terminal."""
    return "".join(
        "\ufffd" if category(letter) == "Cc" and letter not in "\n\t" else letter for letter in text
    )


if __name__ == "__main__":
    sys.exit(main())
