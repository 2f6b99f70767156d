"""Are the answers to fixed prompts those that greedy decoding gives, on any layout?

Expected values come from `generate` of `transformers` on the same weights, and from one rank.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AfmoeConfig, AfmoeForCausalLM

from tests.chats import CONTROL, byte_level
from tests.ranks import run_ranks
from tests.runs import metrics, tensors
from trainer import train
from trainer.config import ConfigError
from trainer.data import ChatSource
from trainer.evaluate import Answers
from trainer.evaluate.answers import PROMPTS
from trainer.lab.report.__main__ import main as report
from trainer.model.hf import hf_config, to_hf

TOKENS = 12


def words(tmp_path: Path, *more: str) -> list[str]:
    tokenizer = tmp_path / "tokenizer.json"
    if not tokenizer.exists():
        byte_level(CONTROL).save(str(tokenizer))
    shape = ["model=debug", "model.vocab_size=608", "model.window=16"]
    rows = ["seq_len=256", "global_batch=4", "micro_batch=1", "data.workers=0", "epochs=1", "optim.lr=0.1"]
    asked = [
        "evaluate=none",
        f"evaluate.a={{_target_: trainer.evaluate.Answers, interval: 1, tokens: {TOKENS}}}",
    ]
    files = [f"run_dir={tmp_path}", f"data.tokenizer={tokenizer}", "branch=null", "checkpoint.interval=1000"]
    return ["experiment=sft", *shape, *rows, *asked, *files, *more]


def trained(overrides: list[str]) -> int:
    return train.train(train.load(overrides))


def answers(directory: Path) -> list[list[dict]]:
    lines = (directory / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["answers"] for line in lines]


@pytest.mark.slow
def test_answers_are_those_of_transformers_on_any_layout(tmp_path: Path) -> None:
    """After two steps, when the model says more than one token; its prompts have other lengths."""
    run_ranks(trained, 1, words(tmp_path, "steps=2", "name=one"))
    layouts = {"ranks": (4, ["parallel=hsdp_ep"]), "cut": (2, ["parallel=fsdp", "parallel.cp=2"])}
    for name, (num_ranks, layout) in layouts.items():
        run_ranks(trained, num_ranks, words(tmp_path, "steps=2", f"name={name}", *layout))
        assert answers(tmp_path / name) == answers(tmp_path / "one")
    config = train.load(words(tmp_path, "steps=2"))
    state = {
        name.removeprefix("model."): tensor
        for name, tensor in tensors(tmp_path / "one", 2).items()
        if name.startswith("model.")
    }
    save_file(to_hf(state, config.model), tmp_path / "model.safetensors")
    AfmoeConfig(**hf_config(config.model, max_position_embeddings=512)).save_pretrained(tmp_path)
    model = AfmoeForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    tokenizer = byte_level(CONTROL)
    source = ChatSource()
    source.bind(tokenizer, None)
    end = tokenizer.token_to_id("<|im_end|>")
    for prompt, row in zip(PROMPTS, answers(tmp_path / "one")[-1], strict=True):
        message = {"role": "user", "content": prompt}
        ids = source.bound([message], variables={"add_generation_prompt": True}).ids.tolist()
        assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|im_start|>assistant\n")
        tokens = torch.tensor([ids])
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
        new = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[
            0, len(ids) :
        ].tolist()
        assert row["tokens"] == len(new) and row["prompt"] == prompt
        assert row["ended"] == (new[-1] == end)
        assert row["answer"] == tokenizer.decode([t for t in new if t != end], skip_special_tokens=False)


def test_answering_changes_nothing_and_is_in_the_report(tmp_path: Path) -> None:
    run_ranks(trained, 1, words(tmp_path, "steps=2", "name=asked"))
    run_ranks(trained, 1, words(tmp_path, "steps=2", "name=silent", "~evaluate.a"))
    assert metrics(tmp_path / "asked") == metrics(tmp_path / "silent")
    asked, silent = tensors(tmp_path / "asked", 2), tensors(tmp_path / "silent", 2)
    assert all(torch.equal(asked[name], silent[name]) for name in asked)
    rows = answers(tmp_path / "asked")
    assert len(rows) == 3 and all(len(row) == len(PROMPTS) for row in rows)  # before, after 1 and 2 steps
    page = tmp_path / "report.html"
    assert report([str(tmp_path / "asked"), f"out={page}"]) == 0
    html = page.read_text()
    assert all(html.count(prompt) >= 3 for prompt in PROMPTS)


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be texts, like"):
        Answers(prompts=[])
    with pytest.raises((ConfigError, ValueError), match="tokens=0"):
        Answers(tokens=0)
    plain = ["experiment=synthetic", "steps=1", "seq_len=32", "data.workers=0", f"run_dir={tmp_path}"]
    asked = "evaluate.a={_target_: trainer.evaluate.Answers}"
    with pytest.raises(ConfigError, match="evaluate.a: asks in a conversation; it needs data=chat"):
        run_ranks(trained, 1, [*plain, asked])
