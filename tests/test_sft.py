"""Does fine-tuning train what it says: every sample so often, on the labels of its mask, from the weights
that it starts from, as a plain loop of `transformers` and `torch.optim.AdamW` does?

Expected values come from that loop, from counting samples, or from invariance to ranks and restarts.
"""

import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AfmoeConfig, AfmoeForCausalLM

from tests.chats import CONTROL, assistant, byte_level, user, write_records
from tests.ranks import run_ranks
from tests.runs import metrics, tensors
from tests.streams import TextListSource, equal, gathered, global_rows, load, make_stream, ranks, step_rows
from trainer import train
from trainer.config import ConfigError, ModelConfig
from trainer.data import ChatSource, DataError, TokenStream, load_tokenizer, steps_left
from trainer.data.chat import DIALOGUES
from trainer.model.hf import hf_config, to_hf
from trainer.program import program_of
from trainer.ranks.stop import PREEMPTED, Stopped
from trainer.run.step import next_batches, train_step

VOCAB = 608  # of the tests' tokenizer, up to a multiple of 8

# -- packing ------------------------------------------------------------------------------------------------


def chats(path: Path, num: int = 40, *, unlabelled: bool = False) -> ChatSource:
    """Samples of all lengths; of every fifth of `unlabelled` the answer lies behind the row."""
    rows = []
    for i in range(num):
        question = f"question {i} " + "why " * (i * 7 % 23)
        if unlabelled and i % 5 == 0:
            question += "because " * 60
        rows.append({"messages": [user(question), assistant(f"answer {i} " + "so " * (i * 5 % 37))]})
    source = ChatSource(str(write_records(path, rows)))
    source.bind(byte_level(CONTROL), None)
    return source


def samples_of(rows_3RL: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens and labels of each sample: a position 0 begins one, and the next one or padding ends it."""
    samples = list[tuple[list[int], list[int]]]()
    for tokens, labels, positions in zip(*rows_3RL.tolist(), strict=True):
        for token, label, position in zip(tokens, labels, positions, strict=True):
            if position == 0:
                samples.append(([], []))
            if position < 0:
                assert label == -100
                continue
            assert position == len(samples[-1][0])
            samples[-1][0].append(token)
            samples[-1][1].append(label)
    return [(tuple(tokens), tuple(labels)) for tokens, labels in samples]


def expected_samples(source: ChatSource, seq_len: int) -> Counter:
    """By hand: the first tokens of each conversation, and as labels those that follow and are learned."""
    samples = Counter()
    for i in range(len(source)):
        document = source[i]
        ids, mask = document.tokens.tolist(), document.mask.tolist()
        labels = [after if learned else -100 for after, learned in zip(ids[1:], mask[1:], strict=True)] + [
            -100
        ]
        if any(label != -100 for label in labels[:seq_len]):
            samples[tuple(ids[:seq_len]), tuple(labels[:seq_len])] += 1
    return samples


FIT = {"packing": "fit", "at_end": "stop", "seq_len": 96, "num_streams": 4, "global_batch": 4}


@pytest.mark.parametrize("global_batch", [4, 8])
def test_each_sample_is_packed_whole_and_once_in_every_epoch(tmp_path: Path, global_batch: int) -> None:
    source = chats(tmp_path / "a.jsonl", unlabelled=True)
    expected = expected_samples(source, 96)
    assert sum(expected.values()) == 32 and any(len(tokens) == 96 for tokens, _ in expected)
    stream = make_stream(source, **{**FIT, "global_batch": global_batch}, epochs=3)
    counted = steps_left(stream, micro_batch=1)
    seen, num_steps = [], 0
    while stream.has_more():
        seen += samples_of(step_rows(stream))
        num_steps += 1
    assert Counter(seen) == Counter({sample: 3 * num for sample, num in expected.items()})
    assert counted == num_steps
    assert stream.counts["no_label"] == 3 * 8 and stream.counts["documents"] == 3 * 32


def test_epochs_have_orders_of_their_own(tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl")
    stream = make_stream(source, **{**FIT, "num_streams": 1, "global_batch": 1}, epochs=2)
    seen = []
    while stream.has_more():
        seen += samples_of(step_rows(stream))
    first, second = seen[:40], seen[40:]
    assert first != second and Counter(first) == Counter(second) == expected_samples(source, 96)


def test_rows_do_not_depend_on_ranks_workers_and_restarts(tmp_path: Path) -> None:
    source = chats(tmp_path / "a.jsonl", unlabelled=True)
    straight, state = make_stream(source, **FIT, epochs=3), None
    count = steps_left(make_stream(source, **FIT, epochs=3), micro_batch=1)
    for step, (num_ranks, workers) in enumerate([(2, 0), (4, 1), (1, 1), (2, 1), (4, 0)]):
        streams = ranks(num_ranks, source, **FIT, epochs=3, workers=workers)
        if state:
            load(streams, state)
        left = max(steps_left(stream, micro_batch=1) for stream in streams)
        assert left == count - 2 * step  # and counting has moved nothing:
        for _ in range(2):
            assert torch.equal(global_rows(streams), step_rows(straight))
        state = gathered(streams)
        assert equal(state, straight.state_dict())
        for stream in streams:
            stream.close()


def test_a_dropped_sample_is_listed_with_file_and_line(tmp_path: Path) -> None:
    source, reported = chats(tmp_path / "a.jsonl", unlabelled=True), []
    stream = make_stream(source, **FIT, shuffle=False, report=reported.append)
    steps_left(stream, micro_batch=1)
    assert not reported
    while stream.has_more():
        step_rows(stream)
    lines = sorted(str(bad) for bad in reported)
    assert lines == sorted(
        f"{tmp_path}/a.jsonl:{n}: no_label: none in its first 96 tokens" for n in range(1, 41, 5)
    )


# -- the oracle ---------------------------------------------------------------------------------------------

SHAPE = ["model=debug", "model.num_layers=3", "model.global_every=3", f"model.vocab_size={VOCAB}"]
STEPS = 20


def overrides(tmp_path: Path, *more: str) -> list[str]:
    """Of a run from initial weights, on the dialogues that ship."""
    tokenizer = tmp_path / "tokenizer.json"
    if not tokenizer.exists():
        byte_level(CONTROL).save(str(tokenizer))
    rows = ["seq_len=256", "global_batch=4", "micro_batch=1", "checkpoint.interval=1000", "data.workers=0"]
    files = [f"run_dir={tmp_path}", f"data.tokenizer={tokenizer}", "branch=null", "anew=false"]
    return ["experiment=sft", *SHAPE, *rows, *files, *more]


def whole_weights(run) -> dict[str, torch.Tensor]:
    state = get_model_state_dict(run.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.clone() for name, tensor in state.items()}


def trained(words: list[str]) -> dict:
    """Rows, losses and rates of each step, and the weights before and after; rows of this rank."""
    run = train.start(train.load(words))
    before, rows, losses, rates, norms = whole_weights(run), [], [], [], []
    for _ in range(STEPS):
        batches = next_batches(run)
        rows.append(torch.cat([torch.stack(list(batch)) for batch in batches], dim=1))
        values = train_step(run, batches)
        losses.append(values["loss"])
        rates.append(values["lr"])
        norms.append(values["grad_norm"])
    result = {"before": before, "after": whole_weights(run), "rows": rows, "losses": losses}
    result |= {"rates": rates, "norms": norms}
    run.stream.close()
    run.held and run.held.close()
    return result


def plain_loop(result: dict, rows_of_steps: list[torch.Tensor], shape: ModelConfig, tmp_path: Path) -> tuple:
    """`transformers` and torch.optim.AdamW: each sample by itself, a sum over labels, one division."""
    model = their_model(result["before"], shape, tmp_path / "before")
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(
        [*groups, {"params": gains, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    losses, norms = [], []
    for rows_3RL, rate in zip(rows_of_steps, result["rates"], strict=True):
        total, num_labels = 0.0, int((rows_3RL[1] != -100).sum())
        for tokens, labels in samples_of(rows_3RL):
            logits = model(torch.tensor([tokens])).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
            (loss / num_labels).backward()
            total += loss.item()
        losses.append(total / num_labels)
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, dict(model.named_parameters())


def their_model(weights: dict[str, torch.Tensor], shape: ModelConfig, path: Path) -> AfmoeForCausalLM:
    from safetensors.torch import save_file

    path.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in to_hf(weights, shape).items()}, path / "model.safetensors")
    AfmoeConfig(**hf_config(shape, max_position_embeddings=4096)).save_pretrained(path)
    return AfmoeForCausalLM.from_pretrained(path, experts_implementation="eager").train()


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, []), (4, ["parallel=hsdp_ep"])], ids=["1", "4"])
def test_twenty_steps_are_those_of_transformers_and_adamw(tmp_path: Path, layout: tuple) -> None:
    """Losses to 1e-5, weights to 1e-4, on rows with masks, packed and padded. Without a balancing rule and
    router losses, which `transformers` does not have in training."""
    num_ranks, words = layout
    words = overrides(
        tmp_path,
        "optim=adamw",
        "optim.lr=0.02",
        "balance=none",
        "data.holdout=0",
        "evaluate=none",
        "epochs=2",
        *words,
    )
    results = run_ranks(trained, num_ranks, words)
    assert all(result["losses"] == results[0]["losses"] for result in results)
    rows = [torch.cat(parts, dim=1) for parts in zip(*(result["rows"] for result in results), strict=True)]
    assert all(((row[1] == -100) & (row[2] >= 0)).any() and (row[2] < 0).any() for row in rows)
    shape = train.load(words).model
    losses, norms, theirs = plain_loop(results[0], rows, shape, tmp_path)
    np.testing.assert_allclose(results[0]["losses"], losses, rtol=1e-5)
    np.testing.assert_allclose(results[0]["norms"], norms, rtol=1e-4)
    assert losses[-1] < losses[0] - 1  # something was learned
    ours = dict(their_model(results[0]["after"], shape, tmp_path / "after").named_parameters())
    moved = dict(their_model(results[0]["before"], shape, tmp_path / "before").named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert (weight - theirs[name]).abs().max() <= 1e-4, name
    assert max((weight - moved[name]).abs().max() for name, weight in ours.items()) > 1e-2


# -- starting from weights ----------------------------------------------------------------------------------


def base_run(tmp_path: Path) -> None:
    """Two steps of pretraining on lines of text, with a tokenizer that lacks control tokens."""
    byte_level([]).save(str(tmp_path / "base.json"))
    text = ["data=jsonl", "data.source.field=note"]
    rows = ["seq_len=64", "global_batch=4", "micro_batch=1", "steps=2", "data.workers=0", "name=base"]
    lines = write_records(tmp_path / "text.jsonl", [{"note": f"line {i} of the text"} for i in range(200)])
    files = [f"run_dir={tmp_path}", f"data.tokenizer={tmp_path / 'base.json'}", f"data.source.path={lines}"]
    shape = [*SHAPE[:-1], "model.vocab_size=600"]
    assert run_ranks(
        train_to_the_end, 1, ["stage=constant", "optim=adamw", *text, *rows, *files, *shape]
    ) == [0]


def train_to_the_end(words: list[str]) -> int:
    return train.train(train.load(words))


def begun(words: list[str]) -> dict[str, torch.Tensor]:
    run = train.start(train.load(words))
    result = whole_weights(run) | {
        "step": torch.tensor(run.step),
        "state": torch.tensor(sum(len(o.state) for o in run.optimizer.optimizers)),
    }
    run.stream.close()
    run.held and run.held.close()
    return result


@pytest.mark.slow
def test_new_control_tokens_get_rows_and_the_rest_is_the_run_s(tmp_path: Path) -> None:
    """From the run itself and from its export, on 1 and 4 ranks: the old rows are its own, the new ones those
    of a run that starts without weights."""
    from trainer.weights.export import main as export

    base_run(tmp_path)
    assert export([str(tmp_path / "base"), str(tmp_path / "out")]) == 0
    names = "data.control_tokens=['<|im_start|>','<|im_end|>','<think>','</think>']"
    words = [*overrides(tmp_path), f"data.tokenizer={tmp_path / 'base.json'}", names]
    fresh = run_ranks(begun, 1, [*words, "name=fresh"])[0]
    starts = {
        "run": [f"branch={tmp_path / 'base'}", "anew=true"],
        "export": [f"init_from={tmp_path / 'out'}"],
        "ranks": [f"branch={tmp_path / 'base'}", "anew=true", "parallel=hsdp_ep"],
    }
    begins = {
        name: run_ranks(begun, 4 if name == "ranks" else 1, [*words, *more, f"name={name}"])[0]
        for name, more in starts.items()
    }
    old = {
        name.removeprefix("model."): t
        for name, t in tensors(tmp_path / "base", 2).items()
        if name.startswith("model.")
    }
    num_old = 600
    for begin in begins.values():
        assert begin["step"] == 0 and begin["state"] == 0
        for name, tensor in old.items():
            ours = begin[name]
            if name in ("tok_embeddings.weight", "lm_head.weight"):
                assert torch.equal(ours[num_old:], fresh[name][num_old:]) and len(ours) == VOCAB
                ours = ours[:num_old]
                assert not torch.equal(ours, fresh[name][:num_old])
            assert torch.equal(ours, tensor), name


def test_a_tokenizer_that_is_trained_leaves_room_for_control_tokens(tmp_path: Path) -> None:
    """So a run may pretrain the rows that its fine-tuning will use: ids behind the words', in their order."""
    texts = TextListSource(DIALOGUES.read_text("utf-8").splitlines())
    tokenizer = load_tokenizer(
        "train", source=texts, vocab_size=400, cache_dir=tmp_path, control_tokens=CONTROL
    )
    assert [tokenizer.token_to_id(token) for token in CONTROL] == [396, 397, 398, 399]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(
        str(tmp_path / "tokenizer.json"), source={}, vocab_size=400, control_tokens=CONTROL
    )
    assert again.to_str() == tokenizer.to_str()
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False).ids != [397]  # as everywhere: text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs=2", "data.at_end=repeat"], "epochs=2 with data.at_end=repeat, which reads on"),
        (["data.tokenizer=train"], "data.tokenizer=train: a tokenizer is not trained on"),
        (["data.tokenizer=null"], "data.source: data.tokenizer=None: a conversation is text"),
        (
            ["data.control_tokens=[]", "data.tokenizer={0}/plain.json"],
            "data.source: the tokenizer has no </think>",
        ),
        (["data.source.path={0}/nothing.jsonl"], "data.source: .*no file matches"),
        (["data.source.labels=some"], "data.source: labels=some: must be one of"),
        (["data.source.template={0}/no.jinja"], "data.source: template=.*no.jinja: cannot be read"),
        (["model.vocab_size=600"], "needs model.vocab_size=604, which is 600"),
        (
            ["+stage.more={{steps: 3, seq_len: 128}}"],
            "epochs=20 with stage.more.global_batch=4 and seq_len=128",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    byte_level([]).save(str(tmp_path / "plain.json"))
    words = [word.format(tmp_path) for word in words]
    with pytest.raises(ConfigError, match=message) as refusal:
        run_ranks(begun, 1, [*overrides(tmp_path), *words])
    assert len(str(refusal.value).splitlines()) == 1


# -- runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_epochs_ends_with_them_and_resumes_on_other_ranks(tmp_path: Path) -> None:
    """Read straight, with a stop after three steps, and then on another number of ranks, rows cut too."""
    words = overrides(
        tmp_path, "stage=constant", "epochs=1", "global_batch=8", "seq_len=512", "micro_batch=2"
    )
    words += ["optim=adamw", "optim.lr=1e-3", "evaluate=held_out", "evaluate.held_out.tokens=1000"]
    run_ranks(train_to_the_end, 1, [*words, "name=straight"])
    run_ranks(train_to_the_end, 2, [*words, "name=moved", "steps=3", "parallel=fsdp"])
    run_ranks(train_to_the_end, 2, [*words, "name=moved", "parallel=fsdp", "parallel.cp=2"])
    run_ranks(train_to_the_end, 1, [*words, "name=again", "steps=3"])
    run_ranks(train_to_the_end, 1, [*words, "name=again"])
    straight, moved = metrics(tmp_path / "straight"), metrics(tmp_path / "moved")
    assert metrics(tmp_path / "again") == straight  # bit for bit on the same rank
    assert len(straight) == len(moved) > 3
    np.testing.assert_allclose([m["loss"] for m in moved], [m["loss"] for m in straight], rtol=1e-5)
    exact = ("tokens", "data/documents", "data/tokens", "data/padding", "data/step_tokens")
    assert [[m.get(k) for k in exact] for m in moved] == [[m.get(k) for k in exact] for m in straight]
    evaluations = [
        json.loads(line) for line in (tmp_path / "straight/evaluations.jsonl").read_text().splitlines()
    ]
    source = ChatSource()
    source.bind(byte_level(CONTROL), None)
    assert straight[-1]["data/documents"] + straight[-1]["data/held_out"] == len(source)
    assert 0 < evaluations[-1]["targets"] < 1000  # what is held out has masks, too


def test_bad_conversations_are_listed_or_fatal_as_configured(tmp_path: Path) -> None:
    good = {"messages": [user("a"), assistant("b")]}
    rows = [
        good,
        b'{"messages": [',
        good,
        {"messages": [user("a"), user("b")]},
        {"messages": [user("a")]},
        good,
    ]
    path = write_records(tmp_path / "mine.jsonl", rows)
    words = overrides(tmp_path, f"data.source.path={path}", "epochs=1", "evaluate=none", "data.holdout=0")
    words += ["global_batch=1", "data.max_bad=1", "optim=adamw"]
    run_ranks(train_to_the_end, 1, words)
    listed = (tmp_path / "sft/bad_documents.0.txt").read_text().splitlines()
    assert sorted(line.split(": ")[:2] for line in listed) == [
        [f"{path}:2", "broken_json"],
        [f"{path}:4", "turns"],
        [f"{path}:5", "no_label"],
    ]  # once each, though the data is read twice: to count the steps, and to train
    assert metrics(tmp_path / "sft")[-1]["data/skipped"] == 3
    with pytest.raises(
        DataError, match=rf"{path}:\d: (broken_json|turns|no_label): .*\ndata.on_bad=skip"
    ) as refusal:
        run_ranks(begun, 1, [*words, "data.on_bad=fatal", "name=fatal"])
    assert "Traceback" not in str(refusal.value)


def test_a_run_that_is_told_to_end_counts_its_epochs_no_further(tmp_path: Path, monkeypatch) -> None:
    """The signal comes with the second step that is counted."""
    counted, next_step = [], TokenStream.next_step

    def step(stream: TokenStream, micro_batch: int) -> list:
        counted.append(next_step(stream, micro_batch))
        if len(counted) == 2:
            signal.raise_signal(signal.SIGTERM)
        return counted[-1]

    monkeypatch.setattr(TokenStream, "next_step", step)
    words = overrides(tmp_path, "epochs=3", "evaluate=none", "global_batch=1", "data.workers=0")
    with pytest.raises(Stopped) as stopped:
        train.start(train.load(words))
    assert stopped.value.code == PREEMPTED and len(counted) == 2


def test_a_validation_set_of_conversations_has_masks(tmp_path: Path) -> None:
    path = write_records(tmp_path / "mine.jsonl", [{"messages": [user("a b c"), assistant("d e")]}] * 3)
    conversations = f"{{_target_: trainer.data.ChatSource, path: {path}}}"
    node = f"evaluate.v={{_target_: trainer.evaluate.Validation, source: {conversations}}}"
    words = overrides(tmp_path, "evaluate=none", node, "steps=1", "epochs=1", "optim=adamw")
    run_ranks(train_to_the_end, 1, words)
    line = json.loads((tmp_path / "sft/evaluations.jsonl").read_text().splitlines()[-1])
    source = ChatSource(str(path))
    source.bind(byte_level(CONTROL), None)
    assert line["targets"] == 3 * int(source[0].mask.sum()) and line["documents"] == 3


def test_routing_biases_go_on_or_rest(tmp_path: Path) -> None:
    words = overrides(tmp_path, "evaluate=none", "epochs=1", "optim=adamw", "steps=3")
    for name, more in {"moving": [], "resting": ["stage.warmup.bias_rate=0"]}.items():
        run_ranks(train_to_the_end, 1, [*words, f"name={name}", *more])
    biases = {name: routing_biases(tmp_path / name) for name in ("moving", "resting")}
    assert all(bias.any() for bias in biases["moving"]) and not any(bias.any() for bias in biases["resting"])
    assert all("balance/max_violation" in line for name in biases for line in metrics(tmp_path / name))


def routing_biases(directory: Path) -> list[torch.Tensor]:
    return [t for name, t in tensors(directory, 3).items() if name.startswith("model.") and "bias" in name]


# -- Trinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["nano", "mini", "large"])
def test_trinity_is_fine_tuned_at_a_tenth_of_its_peaks(size: str) -> None:
    """By hand from the report: rows of 64K, up to a tenth, linear to 0, greedy packing."""
    config = train.load([f"experiment=trinity_{size}_sft", "steps=1000"])
    warmup, decay = program_of(config).spans
    assert (warmup.lr.first, warmup.lr.last, decay.lr.last) == (0, 0.1, 0)
    assert warmup.lr.shape == decay.lr.shape == "linear" and config.data.packing == "fit"
    assert {span.now.seq_len for span in (warmup, decay)} == {65_536}
    base = train.load([f"experiment=trinity_{size}"])
    assert (config.optim, config.model, config.balance) == (base.optim, base.model, base.balance)
    p = config.parallel
    num_ranks, readers = p.dp_replicate * p.dp_shard * p.cp, p.dp_replicate * p.dp_shard
    assert num_ranks == {"nano": 512, "mini": 512, "large": 2048}[size]
    program_of(config).check_split(num_ranks=readers, num_streams=config.data.num_streams)


def test_epochs_are_steps_for_those_who_read_no_data() -> None:
    with pytest.raises(ConfigError, match=r"not set: steps.*epochs= is counted where a run starts"):
        program_of(train.load(["experiment=trinity_mini_sft"]))
