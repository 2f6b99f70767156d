"""Triquetra: pretrain mixture-of-experts models, and know that no expert dies.

    triquetra train       train a model                       triquetra train experiment=demo
    triquetra tokenize    a corpus, written once as tokens    triquetra tokenize out data=jsonl ...
    triquetra simulate    router balance without a model      triquetra simulate compare=all seeds=5
    triquetra preview     what a run will do, before it runs  triquetra preview experiment=trinity_large
    triquetra plan        memory, time, best layout           triquetra plan device=h200 model=mini ...
    triquetra preflight   are hosts and devices fit for it?   triquetra preflight experiment=demo
    triquetra watch       a run, live in the terminal         triquetra watch runs/demo
    triquetra report      what runs did, as one HTML page     triquetra report runs/demo
    triquetra evaluate    held-out loss, tasks, needles       triquetra evaluate runs/demo evaluate=held_out
    triquetra export      weights that transformers loads     triquetra export runs/demo out --verify
    triquetra chat        talk to a model                     triquetra chat runs/sft
    triquetra generate    what follows a text, for scripts    triquetra generate runs/demo "def main():"
    triquetra checkpoint  list, verify, rewind                triquetra checkpoint list runs/demo
    triquetra ablate      a study: arms x seeds               triquetra ablate study=rules

`triquetra COMMAND --help` says more; `triquetra --version` prints the version. Without an installation:
`python -m trainer COMMAND`. Several processes: `torchrun ... -m trainer.train`, or launch/local.sh.
"""

import ast
import sys
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from trainer.ranks.stop import StopRequest
from trainer.terminal import outlive_terminal
from trainer.version import __version__

COMMANDS = {
    "train": "trainer.train",
    "tokenize": "trainer.tokenize",
    "simulate": "trainer.lab.simulate.__main__",
    "preview": "trainer.lab.preview.__main__",
    "plan": "trainer.lab.plan.__main__",
    "preflight": "trainer.preflight.__main__",
    "watch": "trainer.lab.watch.__main__",
    "report": "trainer.lab.report.__main__",
    "evaluate": "trainer.evaluate.__main__",
    "export": "trainer.weights.export",
    "chat": "trainer.chat.__main__",
    "generate": "trainer.chat.generate",
    "checkpoint": "trainer.checkpoint.__main__",
    "ablate": "trainer.lab.ablate.__main__",
}
COMPOSED = ("train", "tokenize", "preview", "plan", "preflight")  # their words are a configuration's
OK, REFUSED = 0, 2


def main(arguments: list[str] | None = None) -> int:
    """Hands the arguments to the command that they name, imported only then. Returns its exit code.

    A user's own rules and sources are found in the working directory, as with `python -m`.
    """
    outlive_terminal()
    if "" not in sys.path:
        sys.path.append("")
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.rstrip())
        return OK
    if command == "--version":
        print(f"triquetra {__version__}")
        return OK
    if command not in COMMANDS:
        print(f"error: {command!r} is no command; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        return REFUSED
    if command in COMPOSED and {"-h", "--help"} & set(rest):
        print(help_of(COMMANDS[command]))
        return OK
    with StopRequest() if command == "train" else nullcontext():  # a signal counts while torch is imported
        return import_module(COMMANDS[command]).main(rest)


def help_of(module: str) -> str:
    """What its own --help prints, without torch, which takes seconds to import."""
    from trainer.config import usage

    source = Path(find_spec(module).origin).read_text(encoding="utf-8")
    return usage(ast.get_docstring(ast.parse(source), clean=False))


if __name__ == "__main__":
    sys.exit(main())
