"""What does a model write after a text? For scripts.

    triquetra generate runs/demo "def main():"            what follows, as it is drawn
    triquetra generate runs/demo - < prompt.txt           the prompt is all of stdin
    triquetra generate runs/demo "import" "def " --json   one line of JSON for each prompt
    triquetra generate runs/sft "What is this?" --chat    the prompt is a message, what follows an answer

Of several prompts each stands before its text, behind "> ", unless there is --json.
The likeliest tokens are taken unless --temperature is above 0; then --seed makes the draw the same each time.
A line of JSON has prompt, text, end ("stop": the model ended it, "length": --max-tokens did), prompt_tokens,
tokens, model and step.

Exit codes: 0 done · 1 the checkpoint is damaged · 2 refused · 130 interrupted.
"""

import argparse
import json
import sys
from functools import partial

from trainer import terminal
from trainer.chat.options import CODES, Ready, parser_of, ready, refuse_text
from trainer.chat.turns import Turns
from trainer.config import ConfigError

OK = 0


def main(arguments: list[str] | None = None) -> int:
    return terminal.run(partial(command, arguments), CODES)


def command(arguments: list[str] | None) -> int:
    options = parsed(arguments)
    prompts = [read_stdin() if prompt == "-" else prompt for prompt in options.prompts]
    for prompt in prompts:
        refuse_text("PROMPT", prompt)
    model = ready(options)
    turns = turns_of(model, options) if options.chat else None
    for prompt in prompts:
        answer(model, turns, prompt, options)
    return OK


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Raises: ConfigError."""
    parser = parser_of("generate", str(__doc__), temperature=0.0, top_p=1.0, max_tokens=128)
    parser.add_argument("prompts", metavar="PROMPT", nargs="+", help="a text; -: all of stdin")
    parser.add_argument("--chat", action="store_true", help="a prompt is a message of a user")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of the draw; 0 without it")
    options = parser.parse_intermixed_args(arguments)
    if not options.chat and (options.system is not None or options.template is not None):
        parser.error("--system and --template belong to --chat")
    if options.prompts.count("-") > 1:
        parser.error("- stands for all of stdin, so it can be one prompt only")
    return options


def read_stdin() -> str:
    """Raises: ConfigError."""
    try:
        return sys.stdin.buffer.read().decode()
    except (AttributeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"PROMPT=-: stdin must be text in UTF-8 ({error})") from error


def turns_of(model: Ready, options: argparse.Namespace) -> Turns:
    turns = Turns(model.origin.directory, model.speaker.tokenizer, options.template)
    if turns.note:
        print(f"note: {model.origin.name}: {turns.note}", file=sys.stderr)
    return turns


def answer(model: Ready, turns: Turns | None, prompt: str, options: argparse.Namespace) -> None:
    """Says what follows a prompt."""
    say = (lambda text: None) if options.json else partial(print, end="", flush=True)
    if options.prompts[1:] and not options.json:
        print(f"> {prompt}")
    if turns is None:
        ids, spoken = model.speaker.prompt_ids(prompt), model.speaker.spoken(say)
    else:
        system = [{"role": "system", "content": options.system}] if options.system is not None else []
        ids = turns.ids([*system, {"role": "user", "content": prompt}])
        spoken = model.speaker.spoken(say, stops=turns.stops, stop_text=turns.stop_text)
    model.speaker.speak(ids, model.draw, spoken)
    line = {
        "prompt": prompt,
        "text": spoken.text,
        "end": spoken.end_reason,
        "prompt_tokens": len(ids),
        "tokens": len(spoken.ids),
        "model": model.origin.name,
        "step": model.origin.step,
    }
    print(json.dumps(line, ensure_ascii=False) if options.json else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
