"""Does TRL's SFTTrainer see the labels and the first loss that data=chat gives?

    python -m benchmarks.sft_trl [SAMPLES]        needs trl, accelerate: docs/fine_tuning.md

The same conversations, tokenizer, chat template and initial weights of a small AFMoE. TRL tokenises, masks
and pads them (assistant_only_loss) and runs `transformers`' model; here they are packed into rows of a stream
and go through ours. Exit code 1 where ids, labels or the loss (1e-4) differ.
"""

import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AfmoeConfig, AfmoeForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from trainer.config import ModelConfig
from trainer.data import IGNORED, ChatSource, Document, StreamConfig, TokenStream
from trainer.model.afmoe import afmoe_config
from trainer.model.hf import hf_config, to_hf
from trainer.model.init import initialize

SEQ_LEN = 1024
CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
TOLERANCE = 1e-4


def small_tokenizer(texts: list[str]) -> Tokenizer:
    level = tokenizers.pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def our_loss(model: torch.nn.Module, source: ChatSource, tokenizer: Tokenizer, num_samples: int) -> float:
    """Of one step that holds all samples, packed: nats per label."""
    config = StreamConfig(
        seq_len=SEQ_LEN,
        global_batch=num_samples,
        num_streams=1,
        seed=0,
        packing="fit",
        at_end="stop",
    )
    stream = TokenStream(config, source=source, tokenizer=tokenizer)
    [batch] = stream.next_step(num_samples)
    assert not stream.has_more()
    with torch.no_grad():
        total = model(batch.tokens_BL, batch.positions_BL, batch.labels_BL)
    return (total / (batch.labels_BL != IGNORED).sum()).item()


def main(num_samples: int = 32) -> int:
    source = ChatSource()
    every = [source.records.record(i)[1] for i in range(len(source))]
    tokenizer = small_tokenizer([str(record) for record in every])
    # what spells a control token is text here, and a control token there
    plain = [record for record in every if not any(token in str(record) for token in CONTROL)]
    records = plain[:: len(plain) // num_samples][:num_samples]
    source.bind(tokenizer, None)
    source.records = Chosen(records)
    shape = ModelConfig(
        vocab_size=1008,
        dim=64,
        num_layers=4,
        num_dense_layers=1,
        ffn_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        window=32,
        num_experts=8,
        top_k=2,
        expert_dim=32,
        route_scale=2.448,
    )
    with torch.device("meta"):
        model = afmoe_config(shape, flex=False).build()
    initialize(model, device=torch.device("cpu"), seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch)
        save_file(to_hf(model.state_dict(), shape), path / "model.safetensors")
        AfmoeConfig(**hf_config(shape, max_position_embeddings=SEQ_LEN)).save_pretrained(path)
        fast = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=source.bound.template,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        )
        trainer = SFTTrainer(
            model=AfmoeForCausalLM.from_pretrained(path, experts_implementation="eager"),
            args=SFTConfig(
                output_dir=str(path / "out"),
                assistant_only_loss=True,
                max_length=SEQ_LEN,
                per_device_train_batch_size=num_samples,
                report_to="none",
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            train_dataset=Dataset.from_list(source.records.rows),
            processing_class=fast,
        )
        rows = {tuple(row["input_ids"]): list(row["labels"]) for row in trainer.train_dataset}
        documents = [source[i] for i in range(num_samples)]
        ours = {tuple(d.tokens.tolist()): labels_of(d) for d in documents}
        num_labels = sum(label != IGNORED for labels in ours.values() for label in labels)
        print(f"{num_samples} conversations, {sum(map(len, ours))} tokens, {num_labels} labels")
        same_ids, same_labels = rows.keys() == ours.keys(), rows == ours
        print(f"the same ids: {same_ids}; the same labels: {same_labels}")
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.eval()
        with torch.no_grad():
            theirs = trainer.compute_loss(trainer.model, dict(batch)).item()
        mine = our_loss(model.eval(), source, tokenizer, num_samples)
        print(f"first loss: TRL {theirs:.6f}, here {mine:.6f}, difference {abs(theirs - mine):.1e}")
        return int(not (same_labels and abs(theirs - mine) <= TOLERANCE))


def labels_of(document: Document) -> list[int]:
    """As TRL has them: not yet shifted."""
    pairs = zip(document.tokens.tolist(), document.mask.tolist(), strict=True)
    return [token if learned else IGNORED for token, learned in pairs]


class Chosen:
    """A few records, without tools: TRL would need a column of them for all."""

    fingerprint = "chosen"

    def __init__(self, records: list[dict]) -> None:
        self.rows = [{"messages": record["messages"]} for record in records]

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, i: int) -> tuple[str, dict]:
        return f"chosen:{i + 1}", self.rows[i]


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
