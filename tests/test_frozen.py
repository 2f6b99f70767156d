"""Some parts of the model are trained: do the others stay as they are, bit for bit, and are the trained ones
trained as ever?

Origins of the expected values: the names of the parameters by hand, the gradients of a run that trains
everything, one rank, the bytes of the trained parameters, the run that never stopped.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.layouts import BASE, GLOBAL_BATCH, batches, full
from tests.ranks import run_ranks
from tests.runs import BASE as SMALL
from tests.runs import metrics, tensors
from trainer import train
from trainer.config import ATOMS, PARTS, ConfigError, atoms_of, load
from trainer.data import Batch
from trainer.model.afmoe import afmoe_config, moe_layers
from trainer.model.frozen import parts
from trainer.weights.export import main as export

# The layers of BASE: dense and local, local, global.
ATTENTION = {
    *(
        f"attention.{name}.weight"
        for name in ("qkv_linear.wq", "qkv_linear.wk", "qkv_linear.wv", "gate", "wo")
    ),
    *(f"attention.{name}.weight" for name in ("q_norm", "k_norm")),
}
NORMS = {f"{name}.weight" for name in ("attention_norm", "post_attention_norm", "ffn_norm", "post_ffn_norm")}
FFN = {f"feed_forward.{name}.weight" for name in ("w1", "w2", "w3")}
EXPERTS = {
    *(f"moe.routed_experts.inner_experts.{name}" for name in ("w1_EFD", "w2_EDF", "w3_EFD")),
    *(f"moe.shared_experts.{name}.weight" for name in ("w1", "w2", "w3")),
}
ROUTER = {"moe.router.gate.weight"}


def of_layers(names: set[str], *layers: int) -> set[str]:
    return {f"layers.{layer}.{name}" for layer in layers for name in names}


EXPECTED = {
    "embedding": {"tok_embeddings.weight"},
    "final_norm": {"norm.weight"},
    "head": {"lm_head.weight"},
    "local_attention": of_layers(ATTENTION, 0, 1),
    "global_attention": of_layers(ATTENTION, 2),
    "local_norms": of_layers(NORMS, 0, 1),
    "global_norms": of_layers(NORMS, 2),
    "local_ffn": of_layers(FFN, 0),
    "local_experts": of_layers(EXPERTS, 1),
    "global_experts": of_layers(EXPERTS, 2),
    "local_router": of_layers(ROUTER, 1),
    "global_router": of_layers(ROUTER, 2),
}


def test_every_parameter_is_of_one_part() -> None:
    with torch.device("meta"):
        model = afmoe_config(load([*BASE, "micro_batch=1"]).model, flex=False).build()
    names = {parameter: name for name, parameter in model.named_parameters()}
    got = dict.fromkeys(EXPECTED, frozenset[str]())
    for part, parameter in parts(model):
        got[part] |= {names.pop(parameter)}
    assert not names and got == EXPECTED


def test_parts_that_stand_for_several() -> None:
    assert atoms_of(None) == set(ATOMS) and len(ATOMS) == 13
    assert PARTS["experts"] == {"global_experts", "local_experts"}
    assert atoms_of(["global_layers"]) == {
        f"global_{kind}" for kind in ("attention", "norms", "ffn", "router", "experts")
    }
    layers = atoms_of(["global_layers", "local_layers"])
    assert layers == atoms_of(["attention", "norms", "ffn", "router", "experts"])
    assert layers | {"embedding", "final_norm", "head"} == set(ATOMS)


# -- a few steps on every layout ---------------------------------------------------------------------------


def worker(overrides: list[str]) -> dict:
    """What two steps did, and the bytes that the first one's gradients were reduced with."""
    run = train.build(load([*BASE, "max_grad_norm=inf", "optim=muon", *overrides]))
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    names = [name.replace("_checkpoint_wrapped_module.", "") for name, _ in run.model.named_parameters()]
    pairs = list(zip(names, run.model.parameters(), strict=True))
    before, reduced, gradients, counts = {name: full(p) for name, p in pairs}, [], [], []
    step, balance, scatter = run.optimizer.step, run.balancer.step, dist.reduce_scatter_single

    def keep_gradients():
        gradients.append({name: full(p.grad) for name, p in pairs if p.grad is not None})
        step()

    def keep_counts(number):
        counts_ME = torch.stack([layer.tokens_per_expert_E for layer in moe_layers(run.model)])
        dist.all_reduce(counts_ME)
        counts.append(counts_ME)
        return balance(number)

    def keep_bytes(output, input, *args, **kwargs):
        reduced.append(input.nbytes)
        return scatter(output, input, *args, **kwargs)

    run.optimizer.step, run.balancer.step, dist.reduce_scatter_single = (
        keep_gradients,
        keep_counts,
        keep_bytes,
    )
    losses = []
    for number in range(2):
        mine = [t[rank * share : (rank + 1) * share] for t in batches(number)]
        micro = [t.split(run.config.micro_batch) for t in mine]
        losses.append(train.train_step(run, [Batch(*rows) for rows in zip(*micro, strict=True)])["loss"])
    return {
        "before": before,
        "after": {name: full(p) for name, p in pairs},
        "gradients": gradients[0],
        "counts": counts,
        "losses": losses,
        "reduced": sum(reduced) / 2,
        "kept": {
            names[i] for i, (_, p) in enumerate(pairs) for o in run.optimizer.optimizers if p in o.state
        },
    }


@cache
def trained(num_ranks: int, *overrides: str) -> list[dict]:
    return run_ranks(worker, num_ranks, list(overrides))


WHOLE = (1, f"micro_batch={GLOBAL_BATCH}")
LAYOUTS = [
    WHOLE,
    (1, "micro_batch=4", "activation_checkpoint=full"),
    (2, "parallel=fsdp_ep", "micro_batch=4", "activation_checkpoint=selective"),
    pytest.param((4, "parallel=hsdp_ep", "micro_batch=1"), marks=pytest.mark.rare),
    pytest.param((4, "parallel=fsdp", "micro_batch=2"), marks=pytest.mark.rare),
]
CHOICES = {
    "global_attention": EXPECTED["global_attention"],
    "local_norms,head": EXPECTED["local_norms"] | EXPECTED["head"],
    "local_experts": EXPECTED["local_experts"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", CHOICES)
def test_trained_parts_are_trained_as_ever_and_the_others_are_untouched(layout: tuple, names: str) -> None:
    everything = trained(*WHOLE)[0]
    one = trained(*WHOLE, f"train_only=[{names}]")[0]
    for got in trained(*layout, f"train_only=[{names}]"):
        assert got["gradients"].keys() == got["kept"] == CHOICES[names]
        for name, after in got["after"].items():
            assert torch.equal(after, got["before"][name]) == (name not in CHOICES[names]), name
        for name, gradient in got["gradients"].items():
            expected = everything["gradients"][name]
            assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
        assert got["losses"] == pytest.approx(one["losses"], rel=1e-5)
        # tokens are counted in every layer, also below the first one that is trained
        assert (
            torch.equal(got["counts"][0], everything["counts"][0])
            and got["counts"][1].sum(1).unique().numel() == 1
        )
        if layout[0] == 2:
            # one microbatch in float32; experts lie on one of two ranks whole, and nobody shares them
            shared = [gradient.numel() for name, gradient in got["gradients"].items() if "inner_" not in name]
            assert got["reduced"] == 4 * sum(shared)


# -- a whole run -------------------------------------------------------------------------------------------

FROZEN = ["train_only=[global_attention]", "optim=muon", "stage=constant"]


def train_worker(overrides: list[str], stop_at: int) -> int:
    config = load([*SMALL, *overrides])
    config.steps = stop_at
    return train.train(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A run that trains all, a frozen branch of it, the same in two parts, and a narrower one of that."""
    root = tmp_path_factory.mktemp("frozen")
    where = [f"run_dir={root}"]
    run_ranks(train_worker, 1, [*FROZEN[1:], "name=base", *where], 2)
    branch = [*FROZEN, f"branch={root}/base", *where]
    run_ranks(train_worker, 1, [*branch, "name=frozen"], 5)
    run_ranks(train_worker, 1, [*branch, "name=parts"], 4)
    run_ranks(train_worker, 1, [*branch, "name=parts"], 5)
    wide = ["train_only=[global_layers]", *FROZEN[1:], *where]
    run_ranks(train_worker, 1, [*wide, "name=wide"], 2)
    run_ranks(train_worker, 1, [*branch[:3], f"branch={root}/wide", "name=narrow", *where], 3)
    return root


@pytest.mark.slow
def test_a_frozen_branch_changes_its_part_alone_and_resumes_bit_for_bit(runs: Path) -> None:
    base, frozen, again = tensors(runs / "base", 2), tensors(runs / "frozen", 5), tensors(runs / "parts", 5)
    assert metrics(runs / "parts") == metrics(runs / "frozen")
    assert frozen.keys() == again.keys() and all(torch.equal(frozen[name], again[name]) for name in frozen)
    weights = {name for name in base if name.startswith("model.") and "expert_bias" not in name}
    changed = {name.removeprefix("model.") for name in weights if not torch.equal(base[name], frozen[name])}
    assert changed == EXPECTED["global_attention"]
    biases = [name for name in base if name.endswith("expert_bias_E")]
    assert biases and not any(torch.equal(base[name], frozen[name]) for name in biases)
    states = {name.removeprefix("optimizer.").rpartition(".")[0] for name in frozen if "optimizer." in name}
    assert states == EXPECTED["global_attention"]
    assert {f"model.{name}" for name in changed} < weights  # a checkpoint has all of the model


def test_a_frozen_run_is_exported_whole(runs: Path) -> None:
    assert export([str(runs / "frozen"), str(runs / "out")]) == 0
    written, frozen = load_file(runs / "out" / "model.safetensors"), tensors(runs / "frozen", 5)
    assert torch.equal(written["lm_head.weight"], frozen["model.lm_head.weight"])
    trained_one = frozen["model.layers.2.attention.wo.weight"]
    assert torch.equal(written["model.layers.2.self_attn.o_proj.weight"], trained_one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["name=frozen", "train_only=null"],
            "now it is train_only=None; set it back to continue, or choose another",
        ),
        (
            ["name=base", "train_only=[head]"],
            "is of a run with train_only=None, now it is train_only=['head']",
        ),
        (
            ["name=new", "train_only=[global_layers]", "branch={}/frozen"],
            "whose optimizer knows no other part; now it is train_only=['global_layers']: train that part or",
        ),
        (
            ["name=new", "branch={}/frozen"],
            "now it is train_only=None: train that part or less, or start from",
        ),
    ],
)
def test_what_an_optimizer_has_no_state_for_is_refused(
    runs: Path, overrides: list[str], message: str
) -> None:
    own = [override.format(runs) for override in overrides]
    with pytest.raises(ConfigError) as error:
        run_ranks(train_worker, 1, [*FROZEN[1:], f"run_dir={runs}", *own], 6)
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[]", "train_only=[]: nothing would be trained; name parts, or use null for all"),
        ("[globl_attention]", "there is no part globl_attention (did you mean global_attention"),
    ],
)
def test_parts_that_are_none_are_refused(names: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load([*BASE, "micro_batch=1", f"train_only={names}"])
    assert message in str(error.value)


def test_a_part_that_this_model_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train_only=\['global_ffn'\]: this model has no such parameter"):
        run_ranks(worker, 1, ["train_only=[global_ffn]", "micro_batch=1"])
