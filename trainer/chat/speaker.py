"""How does a model say something, token by token? `transformers` loads it and draws the tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from trainer.checkpoint import read_json
from trainer.config import ConfigError
from trainer.data import end_of_text_id, ready_tokenizer
from trainer.weights.verify import VerifyError, continued, their_model


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How the next token is chosen."""

    temperature: float  # 0: the likeliest
    top_p: float  # the likeliest that have this probability together
    max_tokens: int  # of one answer

    def options(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass
class Spoken:
    """What has been said so far: a streamer of transformers' generate.

    say: is handed every piece of text once it is whole. end: what ended it: "stop", "length", "interrupt".
    """

    tokenizer: Tokenizer
    say: Callable[[str], None]
    stops: set[int] = field(default_factory=set)
    stop_text: str | None = None
    ids: list[int] = field(default_factory=list)
    text: str = ""
    end_reason: str = "length"

    def __post_init__(self) -> None:
        self.decode, self.is_prompt, self.num_said = DecodeStream(skip_special_tokens=False), True, 0

    def put(self, ids: torch.Tensor) -> None:
        if self.is_prompt:  # comes first
            self.is_prompt = False
            return
        self.ids += ids.flatten().tolist()
        if self.ids[-1] in self.stops:
            self.end_reason = "stop"
            return
        self.text += self.decode.step(self.tokenizer, self.ids[-1]) or ""
        if self.stop_text and self.stop_text in self.text:
            self.text, self.end_reason = self.text.partition(self.stop_text)[0], "stop"
            raise Stopped
        self.flush(held=self.could_stop())

    def could_stop(self) -> int:
        """How many of the last letters may be the beginning of what ends the text."""
        stop = self.stop_text or ""
        return next((n for n in range(len(stop), 0, -1) if self.text.endswith(stop[:n])), 0)

    def flush(self, held: int = 0) -> None:
        whole = self.text[self.num_said : len(self.text) - held]
        if whole:
            self.say(whole)
            self.num_said += len(whole)

    def end(self) -> None:
        """generate calls it after the last token."""

    def finish(self) -> None:
        """Says what was held back: the end of a text that was cut within a letter, too."""
        if self.end_reason != "stop" or self.stop_text is None:
            said = self.ids[:-1] if self.end_reason == "stop" else self.ids
            self.text = self.tokenizer.decode(said, skip_special_tokens=False)
        self.flush()


class Stopped(Exception):
    """The text has ended, though no token says so."""


class Speaker:
    """A model of transformers with its tokenizer, from a directory."""

    def __init__(self, directory: Path, device: str) -> None:
        """Raises: ConfigError, DamagedError, ValueError, VerifyError."""
        self.tokenizer = ready_tokenizer(str(directory))
        self.tokenizer.encode_special_tokens = True  # text that looks like a control token stays text
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.model = loaded(directory).to(device)
        self.device, self.trained_length = device, getattr(self.model.config, "max_position_embeddings", None)
        file = directory / "generation_config.json"
        ids = (read_json(file) if file.is_file() else {}).get("eos_token_id")
        self.stops = {ids} if isinstance(ids, int) else set(ids or [])

    def __str__(self) -> str:
        num_weights = sum(weight.numel() for weight in self.model.parameters())
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"{num_weights:,} parameters, {dtype} on {self.device}"

    def spoken(self, say: Callable[[str], None], **stops: Any) -> Spoken:
        """An answer that is still to be said. stops: what ends it besides the model's own."""
        own = {"stops": self.stops | stops.pop("stops", set())}
        return Spoken(self.tokenizer, say, **own, **stops)

    @torch.no_grad()
    def speak(self, ids: Sequence[int], draw: Draw, spoken: Spoken) -> Spoken:
        """Fills `spoken`, also with what was said before a KeyboardInterrupt."""
        tokens_BL = torch.tensor([ids], device=self.device)
        stops = sorted(spoken.stops) or None
        try:
            continued(
                self.model,
                tokens_BL,
                draw.max_tokens,
                streamer=spoken,
                eos_token_id=stops,
                **draw.options(),
            )
        except Stopped:
            pass
        except KeyboardInterrupt:
            spoken.end_reason = "interrupt"
            raise
        finally:
            spoken.finish()
        return spoken

    def prompt_ids(self, text: str) -> list[int]:
        """As transformers' tokenizer makes them; an empty text begins where a document ended. Raises:
        ValueError.
        """
        return self.tokenizer.encode(text).ids or [end_of_text_id(self.tokenizer)]


def loaded(directory: Path) -> Any:
    """transformers' model. Raises: ConfigError, VerifyError."""
    try:
        return their_model(directory, "auto")
    except VerifyError:
        raise
    except Exception as error:  # a dozen kinds, of three libraries
        said = " ".join(str(error).split())
        raise ConfigError(
            f"{directory}: transformers cannot load it ({type(error).__name__}: {said})"
        ) from error


def device_named(name: str) -> str:
    """auto: a GPU where there is one. Raises: ConfigError."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise ConfigError("--device=cuda: torch sees no GPU here; use --device=cpu")
    return ("cuda" if has_gpu else "cpu") if name == "auto" else name
