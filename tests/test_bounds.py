"""Every number of the schema has limits with a reason, and what lies outside is refused in one line."""

import dataclasses
import math
import types
import typing
from dataclasses import fields, make_dataclass
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import trainer.balance.losses as losses
import trainer.program as program
from trainer.balance import LossWeights
from trainer.config import (
    Config,
    ConfigError,
    RouterLossWeights,
    SpanConfig,
    check_numbers,
    check_values,
    divisors,
    load,
    read_plain,
    reread,
    resolved_yaml,
)
from trainer.config.bounds import Number, bounds_of, number
from trainer.data import SyntheticSource, TextSource
from trainer.program import program_of
from trainer.ranks.device import Degrees, degrees_of
from trainer.run import memory
from trainer.run.build import loss_weights, sources_of
from trainer.run.directory import take

RUN = ["experiment=demo", "steps=1", "dtype=float32"]


def numbers_of(schema: type, where: str = "") -> list[tuple[str, Number | None]]:
    """Every field that may be a number, also of the dataclasses inside."""
    collected = []
    hints = typing.get_type_hints(schema)
    for of, bound in bounds_of(schema):
        kinds = set(typing.get_args(hints[of.name])) or {hints[of.name]}
        if dataclasses.is_dataclass(hints[of.name]):
            collected += numbers_of(hints[of.name], f"{where}{of.name}.")
        elif kinds & {int, float} and typing.get_origin(hints[of.name]) in (
            None,
            types.UnionType,
            typing.Union,
        ):
            collected.append((f"{where}{of.name}", bound))
    return collected


NUMBERS = [*numbers_of(Config), *numbers_of(SpanConfig, "stage.warmup.")]


def test_the_walk_over_the_schema_meets_numbers_of_every_group():
    keys = {key for key, _ in NUMBERS}
    assert {"seed", "model.dim", "data.retry_s", "guard.grace", "stage.warmup.sequence_loss_weight"} <= keys
    assert len(keys) == len(NUMBERS) > 60


@pytest.mark.parametrize(("key", "bound"), NUMBERS, ids=[key for key, _ in NUMBERS])
def test_every_number_has_both_limits_and_a_reason(key, bound):
    assert isinstance(bound, Number)
    assert bound.why
    assert (bound.at_least is None) != (bound.above is None)
    lowest = bound.at_least if bound.above is None else bound.above
    assert lowest < bound.at_most
    for wrong in (math.nan, -math.inf, lowest - 1, 2 * bound.at_most if math.isfinite(bound.at_most) else -1):
        assert bound.problem(wrong)
    assert bound.problem(bound.at_most) is None
    assert (bound.problem(lowest) is None) == (bound.above is None)


@pytest.mark.parametrize(("key", "bound"), [pair for pair in NUMBERS if pair[0].startswith("model.")][:3])
def test_a_limit_of_the_schema_is_that_of_the_command_line(key, bound):
    with pytest.raises(ConfigError) as error:
        load([*RUN, f"{key}={bound.at_most + 1}"])
    assert str(error.value) == f"{key}={bound.at_most + 1}: must be at most {bound.at_most} ({bound.why})"


REFUSED = {  # override: how its message begins
    "timeout_s=inf": "timeout_s=inf: must be at least 1, and finite",
    "timeout_s=1e30": "timeout_s=1e+30: must be at most 2e+06 (23 days",
    "heartbeat_s=1e-320": "heartbeat_s=1e-320: must be at least 1 (a rank that waits for a core",
    "model.num_experts=9223372036854775807": "model.num_experts=9223372036854775807: must be at most 65536 (",
    "model.ffn_dim=1000000007": "model.ffn_dim=1000000007: must be at most 1048576 (",
    "model.num_shared_experts=1000000007": "model.num_shared_experts=1000000007: must be at most 1024 (",
    "global_batch=1000000007": "global_batch=1000000007: must be at most 1048576 (",
    "data.workers=1000000007": "data.workers=1000000007: must be at most 256 (",
    "max_grad_norm=nan": "max_grad_norm=nan: must be above 0, and finite",
    "z_loss_weight=-0.0": "z_loss_weight=-0.0: must be 0 or more",
    "logging.tracker=3": "logging.tracker=3: must be a node with a _target_, like {_target_: trainer.metrics",
    "data.source=3": "data.source=3: must be a node with a _target_, like {_target_: trainer.data",
    "balance.rule={_target_: trainer.balance.SignRule, lr: 1}": "balance.rule",
    "run_dir=": "run_dir=: is empty (an unset shell variable?)",
    "data.cache_dir=' '": "data.cache_dir= : is empty",
    "init_from=": "init_from=: is empty",
    "init_from='a\nb'": "init_from='a\\nb': holds a line break; give a path",
    "balance.trace=../x": "balance.trace='../x': must be one plain",
    "balance.trace=metrics.jsonl": "balance.trace=metrics.jsonl: the run writes that itself; use another",
    "balance.trace=bad_documents.0.txt": "balance.trace=bad_documents.0.txt: the run writes that itself",
    "name=Ω": "name=Ω: cannot be read; letters beyond ASCII, and =,~(){}[] and quotes in a value need quotes",
    "name=a(b": "name=a(b: cannot be read; letters",
    "stage.warmup.steps=a=b": "stage.warmup.steps=a=b: cannot be read; letters",
    "steps": "steps: must be key=value, like steps=100",
    "'name=x'": "'name=x': must be key=value",
    "guard.ladder=[a]": "'guard.ladder=[a]': Key 'ladder' not in 'GuardConfig' (did you mean guard.",
    "name=" + "x" * 256: "name=xxxxxxxxxxxxxxxxxxxx...: has 256 bytes; use at most 255",
    "optim.lr=nan": "optim.lr=nan: must be finite",
    "~seq_len": "not set: seq_len; leave out ~seq_len, or give seq_len=",
    "~name": "not set: name; leave out ~name, or give name=",
    "optim.betas=[a,b]": "optim.betas=['a', 'b']: trainer.optim.muon wants",
    "name=a\0b": "'name=a\\x00b': must be text in UTF-8, without a zero byte",
    "name=\udcff": "'name=\\udcff': must be text in UTF-8",
}


@pytest.mark.parametrize("override", REFUSED)
def test_nonsense_is_refused_in_one_line(override):
    with pytest.raises(ConfigError) as error:
        load([*RUN, override])
    assert str(error.value).startswith(REFUSED[override])
    assert "\n" not in str(error.value)


def test_infinity_is_allowed_where_it_is_documented():
    config = load([*RUN, "max_grad_norm=inf", "data.max_document_mb=inf"])
    assert config.max_grad_norm == config.data.max_document_mb == math.inf


@pytest.mark.parametrize("n", [*range(1, 200), 1009 * 1013, 2**20])
def test_divisors_are_those_of_a_slow_loop(n):
    assert divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


# -- constructors -----------------------------------------------------------------------------------------

LENGTHS = {"vocab_size": 100, "num_topics": 4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"length_sigma": math.inf}, "length_sigma=inf: must be 0 or more, and finite"),
        ({"length_sigma": -0.0}, "length_sigma=-0.0: must be 0 or more"),
        ({"mean_length": 1e30}, "mean_length=1e\\+30: must be at most 1e\\+08"),
        (
            {"mean_length": 1e7, "length_sigma": 3.0},
            "mean_length=1e\\+07 with length_sigma=3: a document could",
        ),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000: must be at most 4294967296"),
        ({"num_documents": 10**12}, "num_documents=1000000000000: must be at most 100000000"),
        ({"num_topics": 0}, "num_topics=0: must be at least 1"),
        ({"noise": 1.5}, "noise=1.5: must be at most 1"),
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"topic_skew": math.nan}, "topic_skew=nan: must be 0 or more, and finite"),
    ],
)
def test_a_synthetic_source_refuses_what_it_cannot_draw(values, message):
    with pytest.raises(ValueError, match=message):
        SyntheticSource(**{**LENGTHS, **values})


def test_the_published_lengths_are_allowed():
    assert len(SyntheticSource(**LENGTHS, mean_length=1e5, length_sigma=1.0)) == 1_000_000


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_current_directory(path, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="path is empty"):
        TextSource(path)


def test_check_numbers_names_the_argument():
    with pytest.raises(ConfigError, match=r"^depth=9: must be at most 8 \(why\)$"):
        check_numbers({"depth": Number(at_least=0, at_most=8, why="why")}, depth=9)


# -- bfloat16 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dtype=bfloat16", "model.dim=20"], "model.dim=20 with dtype=bfloat16: .* use model.dim=16 or 24"),
        (
            ["model.expert_dtype=bfloat16", "model.expert_dim=7"],
            "expert_dim=7 with model.expert_dtype=bfloat16",
        ),
        (["model.expert_dtype=bfloat16", "model.expert_dim=7"], "use model.expert_dim=8, or float32$"),
    ],
)
def test_rows_that_the_grouped_gemm_refuses_are_refused_with_the_nearest_sizes(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load([*RUN, *overrides])


def test_other_rows_are_allowed_in_float32_and_without_experts():
    odd = ["model.dim=20", "model.expert_dim=7"]
    assert load([*RUN, *odd]).model.dim == 20
    assert load([*RUN, *odd, "dtype=bfloat16", "model.expert_dtype=float32"]).model.dim == 20
    assert load([*RUN, *odd, "dtype=bfloat16", "model.num_dense_layers=${model.num_layers}"]).model.dim == 20


# -- router losses ----------------------------------------------------------------------------------------


def test_each_weight_of_the_schema_is_one_loss_and_the_other_way_round():
    every = loss_weights(RouterLossWeights(**{of.name: 1.0 for of in fields(RouterLossWeights)}))
    assert every == LossWeights(**dict.fromkeys(losses.LOSSES, 1.0))


def test_each_weight_reaches_its_loss_from_the_run_and_from_a_span():
    for key in program.LOSS_KEYS:
        config = load([*RUN, f"balance.{key}=0.25", f"stage.decay.{key}=0.5", "steps=10"])
        first, *_, last = (loss_weights(span.now) for span in program_of(config).spans)
        changed = {name for name, weight in vars(first).items() if weight == 0.25}
        assert changed == {name for name, weight in vars(last).items() if weight == 0.5} and len(changed) == 1


def test_a_further_loss_is_one_field_and_one_line(monkeypatch):
    """Added as somebody would, at run time: the set is read from two declarations and named nowhere else."""
    further = make_dataclass(
        "Further",
        [("entropy_loss_weight", float, number(0.0, at_least=0.0, at_most=1.0, why="of a test"))],
        bases=(RouterLossWeights,),
        kw_only=True,
    )
    keys = tuple(of.name for of in fields(further))
    loss = lambda r: (-r.scores_BLE.log()).sum()  # noqa: E731  # as in LOSSES
    monkeypatch.setitem(losses.LOSSES, "entropy", loss)
    weights = make_dataclass("W", [(n, float, 0.0) for n in losses.LOSSES], frozen=True, kw_only=True)
    monkeypatch.setattr("trainer.run.build.LOSS_KEYS", keys)
    monkeypatch.setattr("trainer.run.build.LossWeights", weights)
    check_values(further(entropy_loss_weight=0.5))
    own = loss_weights(further(entropy_loss_weight=0.5))
    scores = torch.tensor([[[0.5, 0.25]]])
    value = losses.router_loss(own, scores, scores.logit(), torch.tensor([[[0]]]), torch.ones(2), None)
    assert value.item() == pytest.approx(0.5 * 3 * math.log(2))  # -ln 0.5 - ln 0.25 = 3 ln 2


# -- memory -----------------------------------------------------------------------------------------------


def refused(*overrides: str, gib: float, num_ranks: int = 1, monkeypatch) -> str | None:
    monkeypatch.setattr(memory, "room_on", lambda on: memory.Room("this machine has", int(gib * 2**30)))
    config = load([*RUN, *overrides])
    try:
        degrees = degrees_of(config.parallel, num_ranks=num_ranks, num_experts=config.model.num_experts)
        memory.refuse_too_large(config, program_of(config), degrees, on=torch.device("cpu"))
    except ConfigError as error:
        return str(error)


def test_what_does_not_fit_is_refused_and_names_the_largest_part(monkeypatch):
    """3 x 2^20 x 128 parameters in its one dense layer, 12 bytes each with Muon: 4.5 GiB."""
    message = refused("model.ffn_dim=1048576", gib=4, monkeypatch=monkeypatch)
    assert message.startswith("model.ffn_dim=1048576 x model.dim=128 x model.num_dense_layers=1: weights, ")
    assert "would take 4.5 GiB" in message
    assert "but this machine has 4.0 GiB; use a smaller one, or more ranks" in message
    assert refused("model.ffn_dim=1048576", gib=80, monkeypatch=monkeypatch) is None
    ranks = {"num_ranks": 8, "monkeypatch": monkeypatch}
    assert refused("model.ffn_dim=1048576", "parallel.dp_shard=8", gib=4, **ranks) is None
    assert refused("model.ffn_dim=1048576", "parallel.dp_shard=2", "parallel.cp=4", gib=4, **ranks) is None


def test_sizes_of_a_span_count_and_the_rows_of_a_step(monkeypatch):
    long = refused("stage.decay.seq_len=1048576", gib=4, monkeypatch=monkeypatch)
    assert long.startswith(
        "stage.decay: micro_batch=4 x seq_len=1048576: what layers keep for their gradients would take "
    )
    many = refused("global_batch=1048576", "seq_len=65536", "micro_batch=1", gib=64, monkeypatch=monkeypatch)
    assert many.startswith("global_batch=1048576 x seq_len=65536: the rows of a step would take 1,536.0 GiB")


def test_the_demo_and_every_size_that_a_laptop_trains_fit_into_little(monkeypatch):
    for name in ("debug", "tiny", "small"):
        assert refused(f"model={name}", gib=1, monkeypatch=monkeypatch) is None


def test_the_room_of_this_machine_is_shared_by_its_ranks(monkeypatch):
    whole = memory.room_on(torch.device("cpu")).num_bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.room_on(torch.device("cpu")).num_bytes == whole // 2
    assert 2**28 < whole < 2**50


# -- YAML of a checkpoint ---------------------------------------------------------------------------------


def test_what_a_run_wrote_is_read_again(tmp_path):
    config = load([*RUN, "stage.decay.sequence_loss_weight=1e-3", "max_grad_norm=inf"])
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(config))
    assert reread(path) == config
    assert OmegaConf.create(read_plain(path)) == OmegaConf.create(path.read_text())


POISONED = {  # text: what its refusal says after the file's name
    "seed: ${oc.env:HOME}": ", line 1: has an interpolation",
    "a: b\nmodel: {dim: '${seed}'}": ", line 2: has an interpolation",
    "seed: !!python/object/apply:os.system [ls]": ", line 1: has the tag tag:yaml.org,2002:python",
    "seed: !!python/object/apply:pathlib.PosixPath [ls]": ", line 1: has the tag tag:yaml.org,2002:python",
    "a: &x [1, 1]\nb: [*x, *x]": ", line 2: has an alias, *x",
    "a: " + "[" * 50_000: ", line 1: is nested more than 32 deep",
    "a: [": ": is not YAML of settings",
    "- 1": ", line 1: is no mapping of settings",
    "7": ", line 1: is no mapping of settings",
    "a: 1\na: 2": ": is not YAML of settings",
    "seed: " + "9" * 5000: ": is not YAML of settings",
    "a: \0": ": is not YAML of settings",
    "#" * (2**20 + 1): ": is larger than 1048576 bytes",
}


@pytest.mark.parametrize("text", POISONED, ids=lambda text: text[:20])
def test_nothing_of_a_checkpoints_yaml_is_resolved_imported_or_expanded(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        reread(path)
    assert str(error.value).startswith(f"{path}{POISONED[text]}")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="config.yaml: cannot be read .No such file"):
        reread(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="config.yaml: is not YAML of settings"):
        reread(tmp_path / "config.yaml")


def test_a_shape_that_no_model_has_is_refused_from_a_checkpoint_too(tmp_path):
    path = Path(tmp_path, "config.yaml")
    path.write_text(resolved_yaml(load(RUN)).replace("vocab_size: 8192", "vocab_size: 10000000000000", 1))
    with pytest.raises(ConfigError, match="config.yaml: model.vocab_size=10000000000000: must be at most"):
        reread(path)


# -- the data's own refusals, and directories ------------------------------------------------------------


def test_spans_follow_one_another_so_only_the_largest_counts():
    """Its rows: 8 x 512 tokens of 24 bytes. Those of the run's own length, 16 x 256, are as many."""
    config = load([*RUN, "steps=10", "stage.decay.seq_len=512", "stage.decay.global_batch=8"])
    parts = memory.parts_of(config, program_of(config), Degrees(1, 1, 1, 1), on_cpu=True)
    [rows] = [part for part in parts if part.what == "the rows of a step"]
    assert rows.num_bytes == 8 * 512 * 24 == 16 * 256 * 24
    [inputs] = [part for part in parts if part.what == "what layers keep for their gradients"]
    m = config.model
    by_hand = 4 * 512 * m.dim * m.num_layers * 4
    assert (inputs.keys, inputs.num_bytes) == ("stage.decay: micro_batch=4 x seq_len=512", by_hand)


def test_tokens_beyond_the_models_vocabulary_are_refused_at_the_source():
    config = load(["experiment=synthetic", "data.source.vocab_size=2000"])
    with pytest.raises(ConfigError, match="data.source.vocab_size exceeds model.vocab_size=1024"):
        sources_of(config.data, vocab_size=config.model.vocab_size)


def test_what_makes_no_source_is_refused():
    config = load([*RUN, "data.source={_target_: pathlib.Path}"])
    with pytest.raises(ConfigError, match="data.source=pathlib.Path: makes no source"):
        sources_of(config.data, vocab_size=config.model.vocab_size)


def test_a_run_directory_that_cannot_be_made_names_the_key_and_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    config = load([*RUN, f"run_dir={tmp_path}/file"])
    with pytest.raises(ConfigError) as error:
        take(config)
    assert str(error.value).startswith(f"run_dir={tmp_path}/file, name=demo: cannot be written to (")
    assert str(error.value).endswith("; choose another directory with run_dir=")
