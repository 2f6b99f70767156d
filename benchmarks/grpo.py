"""Does TRL's GRPO train an export, and do its weights come back by `init_from`, bit for bit?

    pip install trl==1.16.0                # in an environment of its own, beside triquetra[chat]
    python -m benchmarks.grpo OUT          # an export with a chat template
    python -m benchmarks.grpo OUT steps=3 tokens=16

Three steps on the CPU with a toy reward: the share of letters of an answer that are an e. The page is
docs/after_pretraining.md.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

import trainer
from trainer.model.hf import KEYS, to_hf

QUESTIONS = ("What is Triquetra?", "What is AFMoE?", "Who are you?", "Which rules balance the experts?")


def reward(completions: list[Any], **_: Any) -> list[float]:
    """Of each answer: how many of its letters are an e."""
    texts = [answer[0]["content"] for answer in completions]
    return [text.count("e") / max(len(text), 1) for text in texts]


def trained(source: Path, out: Path, *, steps: int, tokens: int) -> list[dict]:
    """GRPO from `source` to `out`. Returns what it logged."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    prompts = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS * 4]
    )
    config = GRPOConfig(
        output_dir=str(out / "trl"),
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=tokens,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
    )
    grpo = GRPOTrainer(model=str(source), reward_funcs=reward, args=config, train_dataset=prompts)
    grpo.train()
    grpo.save_model(str(out / "model"))
    return [line for line in grpo.state.log_history if "reward" in line]


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in directory.glob("*.safetensors") for name, one in load_file(file).items()}


def read_back(directory: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """What a run that starts from there holds at step 0, under the names on disk."""
    shape = json.loads((directory / "config.json").read_text())
    shape["rope_theta"] = shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"]
    model = [f"model.{key}={shape[name]}" for key, name in KEYS.items()]
    where = [f"init_from={directory}", f"data.tokenizer={directory}/tokenizer.json", f"run_dir={run_dir}"]
    config = trainer.load(
        [
            *model,
            *where,
            "name=back",
            "data.workers=0",
            "steps=1",
            "seq_len=64",
            "global_batch=1",
            "micro_batch=1",
        ]
    )
    run = trainer.start(config)
    state = {name: whole(tensor) for name, tensor in run.model.state_dict().items()}
    run.stream.close()
    return to_hf(state, config.model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main() -> int:
    source, *more = sys.argv[1:]
    options = {"steps": 3, "tokens": 16} | {
        key: int(value) for key, value in (one.split("=") for one in more)
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for line in trained(Path(source), out, **options):
            keys = ("reward", "loss", "grad_norm", "completions/mean_length")
            print({key: line[key] for key in keys if key in line})
        before, after = weights(Path(source)), weights(out / "model")
        moved = sum(not torch.equal(before[name].float(), after[name].float()) for name in after)
        print(f"{moved} of {len(after)} tensors moved; names as before: {before.keys() == after.keys()}")
        back = read_back(out / "model", out)
        same = back.keys() == after.keys() and all(torch.equal(back[n], after[n].float()) for n in after)
        kinds = sorted({str(one.dtype) for one in after.values()})
        print(f"read back by init_from, {kinds}: {'bit for bit' if same else 'NOT the same'}")
        print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    torch.distributed.destroy_process_group()
    return 0 if same and moved else 1


if __name__ == "__main__":
    sys.exit(main())
