"""How fast is a whole training step next to `transformers`, and which share of the matmul peak is it?

    python -m benchmarks.train_step [rounds=7] [only=bfloat16] [clock=wall] [profile=true] [any setting
    of the trainer: model=small seq_len=512 ...]

All train the same AFMoE from the same weights on the same packed batch, with the same threads, fused AdamW
and clipping: our `train_step` in float32 and in bfloat16 (balancing included, reading data excluded), and
`AfmoeForCausalLM` in float32, under autocast to bfloat16 and with all of it in bfloat16, with each of its
expert implementations and our allocator setting; in float32 without that, too. Each contender has a process
of its own, because an allocator belongs to a process; the rounds are interleaved, each figure is a median,
and each ratio one of a round. only: of `transformers`, those whose label has this in it. clock: wall, or
cpu seconds of the process.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AfmoeConfig, AfmoeForCausalLM

from trainer import train
from trainer.config import load
from trainer.data import Batch
from trainer.model.attention import Blocks
from trainer.model.hf import hf_config, to_hf
from trainer.ranks import device
from trainer.size import flops_per_token

SETTINGS = [
    "name=benchmark",
    "model=small",
    "data=synthetic",
    "steps=1000000",
    "seq_len=512",
    "global_batch=4",
    "micro_batch=4",
    "optim.lr=1e-4",
    "stage.warmup.share=0",
]
# batched_mm copies the weights of an expert for each token: 24 GiB at these shapes
EXPERTS = ("grouped_mm", "eager")
DTYPES = ("float32", "bfloat16")
# of a machine that is not idle, CPU seconds tell more, with OMP_NUM_THREADS=1: threads wait for each other
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS = "ours, bfloat16"  # what the others are compared with


def packed_batch(vocab_size: int, *, rows: int, seq_len: int) -> Batch:
    """Random tokens; each row two documents, cut at a different place."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (rows, seq_len + 1), generator=generator)
    cut = torch.randint(1, seq_len, (rows, 1), generator=generator)
    index = torch.arange(seq_len).expand(rows, -1)
    labels = tokens[:, 1:].masked_fill(index == cut - 1, -100)
    return Batch(tokens[:, :-1].contiguous(), labels, torch.where(index < cut, index, index - cut))


def of_all_pairs(mask: Blocks, length: int) -> Tensor:
    """(B, 1, L, L): True where a token sees another."""
    pairs = torch.zeros(mask.num_rows, 1, length, length, dtype=torch.bool)
    for block in mask.blocks:
        pairs[:, :, block.queries, block.keys] = mask.sees(block)
    return pairs


def ours(config, directory: Path, *, dtype: str) -> Callable[[], float]:
    """Also writes the weights that the others start from."""
    run = train.build(replace(config, dtype=dtype))
    weights = to_hf(run.model.state_dict(), config.model)
    save_file(
        {k: v.contiguous() for k, v in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    AfmoeConfig(**hf_config(config.model, max_position_embeddings=config.seq_len)).save_pretrained(directory)
    batch = packed_batch(config.model.vocab_size, rows=config.global_batch, seq_len=config.seq_len)
    inputs = run.model.attention_inputs(batch.positions_BL)
    masks = {"full_attention": inputs.global_mask, "sliding_attention": inputs.local_mask}
    torch.save(
        {name: of_all_pairs(mask, config.seq_len) for name, mask in masks.items()}, directory / "masks"
    )
    micro_batches = [
        Batch(*parts) for parts in zip(*(t.split(config.micro_batch) for t in batch), strict=True)
    ]
    return lambda: train.train_step(run, micro_batches)["loss"]


def transformers(
    config, directory: Path, *, experts: str, our_allocator: bool, dtype: str
) -> Callable[[], float]:
    """Its masks are made beforehand, outside the clock: the model does not derive document masks from
    positions. dtype: float32, autocast (bfloat16, from float32 weights) or bfloat16, its optimizer's, too.
    """
    if our_allocator:
        device.keep_freed_memory()
    model = AfmoeForCausalLM.from_pretrained(
        directory,
        attn_implementation="sdpa",
        experts_implementation=experts,
        dtype="bfloat16" if dtype == "bfloat16" else "float32",
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batch = packed_batch(config.model.vocab_size, rows=config.global_batch, seq_len=config.seq_len)
    masks = torch.load(directory / "masks")

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            logits = model(
                batch.tokens_BL, position_ids=batch.positions_BL, attention_mask=masks, use_cache=False
            ).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch.labels_BL.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def matmul_peak(dtype: str, clock: Callable[[], float]) -> Callable[[], float]:
    return lambda: device.measured_flops(getattr(torch, dtype), clock)


def serve(build: Callable, pipe, clock: Callable[[], float]) -> None:
    """Runs a step whenever told to. Answers with (seconds, what the step returned)."""
    step = build()
    pipe.send("ready")
    while (order := pipe.recv()) != "end":
        start_s = clock()
        if order == "profile":
            with profile(activities=[ProfilerActivity.CPU]) as recorded:
                value = step()
            print(
                recorded.key_averages().table(
                    sort_by="self_cpu_time_total", row_limit=24, max_name_column_width=48
                )
            )
        else:
            value = step()
        pipe.send((clock() - start_s, value))


def contenders(config, directory: Path, own: dict[str, str]) -> dict[str, Callable[[], Callable[[], float]]]:
    """By label. The first one writes the weights that the others start from."""
    builders = {f"ours, {dtype}": partial(ours, config, directory, dtype=dtype) for dtype in DTYPES}
    builders |= {f"peak, {dtype}": partial(matmul_peak, dtype, CLOCKS[own["clock"]]) for dtype in DTYPES}
    for dtype, experts, allocator in product((*DTYPES, "autocast"), EXPERTS, (False, True)):
        label = f"transformers, {dtype}, {experts}{'' if allocator else ', its own allocator'}"
        if own["only"] in label and (allocator or dtype == "float32"):
            builders[label] = partial(
                transformers, config, directory, experts=experts, our_allocator=allocator, dtype=dtype
            )
    return builders


def main() -> None:
    own = {"rounds": "7", "profile": "false", "only": "", "clock": "wall"}
    own |= dict(argument.split("=", 1) for argument in sys.argv[1:] if argument.split("=")[0] in own)
    config = load([*SETTINGS, *(argument for argument in sys.argv[1:] if argument.split("=")[0] not in own)])
    with tempfile.TemporaryDirectory() as name:
        context, pipes = get_context("fork"), {}
        for label, build in contenders(config, Path(name), own).items():
            pipes[label], child = context.Pipe()
            context.Process(target=serve, args=(build, child, CLOCKS[own["clock"]]), daemon=True).start()
            assert pipes[label].recv() == "ready"
        losses = {label: ask(pipe)[1] for label, pipe in pipes.items() if not label.startswith("peak")}
        for label, loss in losses.items():
            near = 1e-4 if "float32" in label else 2e-2
            assert abs(loss - losses[f"ours, {DTYPES[0]}"]) < near, f"not the same model: {losses}"
        for _ in range(2):  # warm
            for pipe in pipes.values():
                ask(pipe)
        answers = [{label: ask(pipe) for label, pipe in pipes.items()} for _ in range(int(own["rounds"]))]
        report(config, answers)
        if own["profile"] == "true":
            ask(pipes[OURS], "profile")
        for pipe in pipes.values():
            pipe.send("end")


def ask(pipe, order: str = "step") -> tuple[float, float]:
    pipe.send(order)
    return pipe.recv()


def report(config, answers: list[dict]) -> None:
    tokens = config.global_batch * config.seq_len
    flop = flops_per_token(config.model, seq_len=config.seq_len) * tokens
    threads, version = torch.get_num_threads(), torch.__version__
    print(f"{tokens} tokens a step, {threads} threads, torch {version}, {len(answers)} rounds")
    peaks = {dtype: statistics.median(answer[f"peak, {dtype}"][1] for answer in answers) for dtype in DTYPES}
    print("matmul peak", ", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in peaks.items()))
    for label in (label for label in answers[0] if not label.startswith("peak")):
        median_s = statistics.median(answer[label][0] for answer in answers)
        ratios = sorted(answer[label][0] / answer[OURS][0] for answer in answers)
        spread = f"{statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        peak = peaks["float32" if "float32" in label else "bfloat16"]
        print(
            f"{label:58s} {tokens / median_s:6.0f} tokens/s  {flop / median_s / peak:4.0%} of the peak"
            + ("" if label == OURS else f"  {OURS} is {spread}")
        )


if __name__ == "__main__":
    main()
