"""A wrong setting fails before anything is built, and the message says what would work."""

from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from trainer.config import CONFIG_DIR, ConfigError, load, resolved_yaml
from trainer.config.compose import _node

RUN = ["name=x", "steps=1", "seq_len=64", "global_batch=2", "micro_batch=2"]


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


GROUPS = [
    f"{g}={o}" for g in ("model", "balance", "parallel", "optim", "stage", "logging") for o in options(g)
]


@pytest.mark.parametrize("choice", GROUPS)
def test_every_option_of_every_group_composes(choice):
    load([*RUN, choice])


@pytest.mark.parametrize("data", [f"data={o}" for o in options("data")])
def test_every_corpus_composes_or_says_what_it_needs(data):
    try:
        load([*RUN, data])
    except ConfigError as error:
        assert "is not set: give it on the command line, data.source." in str(error)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_composes_and_survives_the_round_trip_through_yaml(experiment):
    config = load([f"experiment={experiment}"])
    assert OmegaConf.create(resolved_yaml(config)) == OmegaConf.create(asdict(config))


@pytest.mark.parametrize("balance", options("balance"))
def test_any_balance_arm_can_replace_that_of_an_experiment(balance):
    rule = load(["experiment=synthetic", f"balance={balance}"]).balance.rule
    assert (rule is None) == (balance == "none")


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=demo"],
        ["experiment=demo", "steps=7", "balance=none", "balance.rule=null", "+stage.x={steps: 3}"],
        ["stage=trinity", "~stage.decay", "optim=muon", "optim.lr=1e-3", "optim={lr: 2}"],
        ["model=debug", "++model.dim=3", "~evaluate", "data=python", "data.source.nothing=1"],
        ["steps=1,2"],
        ["steps=[1"],
        ["optim@model=muon"],
        ["~experiment", "~model"],
        ["+model=debug"],
        ["++model=debug"],
        ["model=none_such", "steps=x"],
        ["steps.x=1", "name={a: 1}"],
        ["~steps=3"],
        ["hydra.run.dir=x"],
        ["+steps=1"],
    ],
)
def test_values_on_top_of_files_are_what_hydra_composes_of_both(overrides):
    def outcome(composed):
        try:
            node = composed()
            return OmegaConf.to_yaml(node), OmegaConf.is_struct(node)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is the same
            return type(error), str(error)

    def whole():
        with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
            return compose("train", overrides)

    assert outcome(lambda: _node("train", *overrides)) == outcome(whole)


def test_overrides_reach_the_config():
    config = load(
        [
            "experiment=demo",
            "steps=7",
            "name=mine",
            "dtype=bfloat16",
            "seed=3",
            "model.dim=64",
            "balance.rule.lr=1e-3",
        ]
    )
    assert (config.steps, config.name, config.dtype, config.seed, config.model.dim) == (
        7,
        "mine",
        "bfloat16",
        3,
        64,
    )
    assert config.balance.rule["lr"] == 1e-3


def test_what_is_blamed_is_the_key_and_not_the_choice_of_its_group():
    with pytest.raises(ConfigError, match=r"'optim.adamw_rl=1': .*did you mean optim.adamw_lr"):
        load(["experiment=demo", "optim=muon", "optim.adamw_rl=1"])


REFUSED = {  # override: what the message must contain
    "stpes=3": "did you mean steps",
    "model.dimm=64": "did you mean model.dim",
    "dim=64": "model.dim",
    "lr=1e-3": "optim.lr",
    "balance.rule.kapa=2": "balance.rule.kappa",
    "+balance.rule.kapa=2": "kappa",
    "optim.learning_rate=1": "optim.learning_rate",
    "model.dim=wide": "wide",
    "steps=many": "many",
    "steps=1.5": "1.5",
    "compile=maybe": "maybe",
    "balance.rule.lr=fast": "balance.rule.lr='fast': trainer.balance.SmebuRule wants float",
    "optim.lr=high": "optim.lr='high'",
    "stage.warmpu.share=0.5": "there is no span warmpu (did you mean warmup",
    "stage.warmup.shaer=0.5": "did you mean share",
    "data.source._target_=trainer.data.Nowhere": "cannot be imported",
    "model=huge": (
        "Could not find 'model/huge' Available options in 'model': debug large mini nano small tiny"
    ),
    "stage=[1]": "'stage=[1]': must be one of constant, cosine, extension_demo, sft, trinity_large",
    "stage=[[]]": "'stage=[[]]': must be one of",
    "logging=[nan]": "'logging=[nan]': must be one of jsonl, tensorboard, wandb",
    "optim=nan": "'optim=nan': must be one of adamw, muon",
    "~data": "data",
    "optim.betas=5": "optim.betas=5: trainer.optim.adamw wants",
    "experiment=dmeo": "demo",
    "steps=0": "steps=0: must be at least 1",
    "model.top_k=17": "model.top_k=17 exceeds model.num_experts=16",
    "model.num_heads=3": "not a multiple of model.num_kv_heads=2",
    "model.head_dim=7": "must be even",
    "model.num_dense_layers=9": "exceeds model.num_layers=6",
    "dtype=float16": "must be one of float32, bfloat16",
    "dtype=bf16": "bfloat16",
    "activation_checkpoint=fully": "did you mean full",
    "data.on_bad=ignore": "skip, fatal",
    "compile=true": "use dtype=bfloat16, model.expert_dtype=bfloat16 or compile=false",
    "name=../elsewhere": "one plain directory name",
    "name=''": "one plain directory name",
    "max_grad_norm=0": "must be above 0",
    "z_loss_weight=-1": "must be 0 or more",
    "seed=-1": "must be at least 0",
    "steps": "steps",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_typo_or_a_wrong_value_names_the_key_and_the_remedy(override):
    with pytest.raises(ConfigError) as error:
        load([*RUN, override])
    assert REFUSED[override] in str(error.value)


def test_what_must_be_set_is_named():
    with pytest.raises(ConfigError, match="global_batch.*name.*experiment=demo"):
        load(["seq_len=64"])


def test_the_published_shapes():
    """arXiv:2602.17004, table 1, typed from the paper: layers, dense, dim, ffn, heads, kv, window, experts,
    top-k, expert dim.
    """
    table = {
        "nano": (56, 2, 1024, 3072, 8, 2, 2048, 128, 8, 256),
        "mini": (32, 2, 2048, 6144, 32, 4, 2048, 128, 8, 1024),
        "large": (60, 6, 3072, 12288, 48, 8, 4096, 256, 4, 3072),
    }
    for name, row in table.items():
        m = load([*RUN, f"model={name}"]).model
        assert (
            m.num_layers,
            m.num_dense_layers,
            m.dim,
            m.ffn_dim,
            m.num_heads,
            m.num_kv_heads,
            m.window,
            m.num_experts,
            m.top_k,
            m.expert_dim,
        ) == row
        assert (m.head_dim, m.vocab_size, m.num_shared_experts) == (128, 200_192, 1)
        assert m.route_scale == (2.448 if name == "large" else 2.826)


def test_configs_lie_where_the_package_looks_for_them():
    assert (Path(CONFIG_DIR) / "train.yaml").is_file()
