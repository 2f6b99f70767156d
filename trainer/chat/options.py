"""Which words of the command line do `chat` and `generate` share, and what becomes of them?"""

import argparse
import logging
from typing import NamedTuple

import torch

from trainer import terminal
from trainer.chat.origin import Origin, origin
from trainer.chat.speaker import Draw, Speaker, device_named
from trainer.checkpoint import DamagedError
from trainer.config import ConfigError
from trainer.weights.export import DAMAGED, INTERRUPTED, REFUSED, OneLineParser
from trainer.weights.verify import VerifyError, need_transformers

CODES = {
    **dict.fromkeys((DamagedError, VerifyError), DAMAGED),
    **dict.fromkeys((ConfigError, OSError, ValueError), REFUSED),
    KeyboardInterrupt: INTERRUPTED,
}


class Ready(NamedTuple):
    """A model that is loaded."""

    origin: Origin
    speaker: Speaker
    draw: Draw


def parser_of(command: str, text: str, *, temperature: float, top_p: float, max_tokens: int) -> OneLineParser:
    """Numbers: what holds without the option."""
    parser = OneLineParser(
        prog=f"triquetra {command}", description=text, formatter_class=argparse.RawTextHelpFormatter
    )
    what = "a run, one of its checkpoints, an export, or a hub name"
    parser.add_argument("model", metavar="RUN", type=terminal.path, help=what)
    add = parser.add_argument
    add("--step", type=int, help="of a run; without it: the newest checkpoint")
    add("--system", metavar="TEXT", help="what the model is told before the first turn")
    add("--template", type=terminal.path, help="a file; without it: the model's own chat template")
    add(
        "--temperature",
        type=float,
        default=temperature,
        help=f"0: the likeliest token; {temperature} without it",
    )
    add(
        "--top-p",
        type=float,
        default=top_p,
        help=f"draw among the likeliest with this share; {top_p} without it",
    )
    add("--max-tokens", type=int, default=max_tokens, help=f"of one answer; {max_tokens} without it")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one")
    return parser


def refuse_numbers(options: argparse.Namespace) -> None:
    """Raises: ConfigError."""
    if not 0 <= options.temperature <= 100:
        raise ConfigError(f"--temperature={options.temperature}: must be from 0 to 100")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p={options.top_p}: must be above 0 and at most 1")
    if not 1 <= options.max_tokens <= 10**7:
        raise ConfigError(f"--max-tokens={options.max_tokens}: must be from 1 to 10,000,000")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed={options.seed}: must be from 0 to 2^63 - 1")
    refuse_text("--system", options.system or "")


def refuse_text(key: str, text: str) -> None:
    """Raises: ConfigError."""
    if any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise ConfigError(f"{key}={text!r}: must be text in UTF-8")


def ready(options: argparse.Namespace) -> Ready:
    """Raises: ConfigError, DamagedError, VerifyError, OSError, ValueError."""
    refuse_numbers(options)
    need_transformers("chat and generate")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    device = device_named(options.device)
    model = origin(str(options.model), options.step)
    speaker = Speaker(model.directory, device)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    draw = Draw(temperature=options.temperature, top_p=options.top_p, max_tokens=options.max_tokens)
    return Ready(model, speaker, draw)
