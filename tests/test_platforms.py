"""launch/kubernetes.yaml, launch/skypilot.yaml, Dockerfile: what do platforms accept, where do ranks meet,
which exit codes begin anew?

The oracle of Kubernetes is the schema of its API (kubernetes-validate), that of the image is hadolint; `make
sky` asks SkyPilot itself, as its package is no part of the tests' own. The shell of both runs here, with a
python that says how it was called.
"""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from trainer.config import load
from trainer.ranks.stop import COLLAPSED, NO_DATA, PREEMPTED, REFUSED, UNSOUND
from trainer.ranks.watchdog import HUNG

LAUNCH = Path(__file__).parent.parent / "launch"
SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
FINAL = [REFUSED, COLLAPSED, NO_DATA, UNSOUND]  # 2, 3, 4, 6: it would end the same way again
OLDEST = "1.31"  # podFailurePolicy is stable from there on
NEWEST = kubernetes_validate.latest_version()


def check(resource, version=NEWEST):
    kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("resource", [SERVICE, JOB], ids=["service", "job"])
def test_the_schema_of_kubernetes_takes_it(resource, version):
    check(resource, version)


def edited(*path, value):
    """The job, with another value there."""
    job = deepcopy(JOB)
    node = job
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return job


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "backoffLimits"), 3),  # misspelt
        (("spec", "template", "spec", "terminationGracePeriod"), 300),
        (("spec", "completions"), "2"),  # a wrong type
        (("spec", "podFailurePolicy", "rules", 0, "onExitCodes", "values"), ["2"]),
        (("spec", "template", "spec", "containers", 0, "env", 0, "value"), 2),
    ],
)
def test_the_schema_refuses_a_slip(path, value):
    with pytest.raises(kubernetes_validate.ValidationError):
        check(edited(*path, value=value))


def test_pods_find_each_other():
    name = JOB["metadata"]["name"]
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert SERVICE["spec"]["selector"] == {"job-name": name}  # Kubernetes gives the pods of a job this label
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    assert f"{name}-0.{POD['subdomain']}:29500" in CONTAINER["command"][2]
    (port,) = SERVICE["spec"]["ports"]
    assert port["port"] == 29500


def test_as_many_pods_as_nodes_and_a_rank_for_each_gpu():
    given = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == int(given["NODES"])
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == int(given["RANKS_PER_NODE"])


def test_kubernetes_begins_anew_where_that_helps():
    """1 and 7 count as failures, up to backoffLimit; 75 and a drained node do not count."""
    fail, told, drained = JOB["spec"]["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob" and fail["onExitCodes"]["values"] == FINAL
    assert told["action"] == "Ignore" and told["onExitCodes"]["values"] == [PREEMPTED]
    assert drained["action"] == "Ignore" and drained["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert JOB["spec"]["backoffLimit"] > 0 and POD["restartPolicy"] == "Never"
    assert {rule["onExitCodes"]["containerName"] for rule in (fail, told)} == {CONTAINER["name"]}


def test_sky_begins_anew_where_that_helps():
    codes = SKY["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert codes == [1, HUNG, PREEMPTED] and not set(codes) & set(FINAL)
    assert "max_restarts_on_errors" not in SKY["resources"]["job_recovery"]  # it would count 2, 3, 4, 6, too


def test_the_last_save_has_its_time_and_the_next_pod_waits_for_it():
    assert POD["terminationGracePeriodSeconds"] > 240  # what torchrun leaves its ranks
    assert "--shutdown-timeout 240" in CONTAINER["command"][2] and "--shutdown-timeout 240" in SKY["run"]
    assert JOB["spec"]["podReplacementPolicy"] == "Failed"


def test_nobody_is_root():
    assert POD["securityContext"]["runAsNonRoot"] and POD["securityContext"]["runAsUser"] == 1000
    text = (LAUNCH.parent / "Dockerfile").read_text()
    assert "--uid 1000" in text and "\nUSER 1000\n" in text


def test_the_linter_of_images_has_nothing_to_say():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [hadolint, LAUNCH.parent / "Dockerfile"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_has_what_it_needs_and_nothing_else():
    """.dockerignore keeps out all but what Dockerfile copies."""
    text = (LAUNCH.parent / "Dockerfile").read_text()
    copied = {
        word.split("/")[0]
        for line in text.splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
    }
    ignored = (LAUNCH.parent / ".dockerignore").read_text().split()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert text.count("--constraint constraints.txt") == 2


@pytest.mark.parametrize("arguments", [CONTAINER["args"], SKY["envs"]["ARGS"].split()], ids=["pods", "sky"])
def test_the_example_is_a_run_whose_checkpoints_lie_on_the_volume(arguments):
    assert load(arguments).run_dir == "/runs"


STAND_IN = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in *preflight*) exit "$UNFIT";; esac
exit "$STATUS"
"""


def called(shell, arguments, directory, *, status=0, unfit=0, **environment):
    """How the shell of a platform's file calls python, and its exit code."""
    for path in (directory / "python", directory / ".venv" / "bin" / "python"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN)
        path.chmod(0o755)
    calls = directory / "calls"
    known = {"CALLS": str(calls), "STATUS": str(status), "UNFIT": str(unfit)}
    known |= {"PATH": f"{directory}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*shell, *arguments], cwd=directory, env=os.environ | known | environment, timeout=60
    )
    return calls.read_text().splitlines(), done.returncode


def pod(directory, *, index, **more):
    named = {"JOB_COMPLETION_INDEX": str(index), "NODES": "2", "RANKS_PER_NODE": "8"}
    return called(CONTAINER["command"], ["name=x", "data.source.path=a b"], directory, **named, **more)


def sky(directory, *, rank, **more):
    named = {
        "SKYPILOT_NODE_RANK": str(rank),
        "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.9",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_TASK_ID": "sky-1",
        "ARGS": "name=x data.source.path='a b'",
        "PREFLIGHT": "0",
        "RESTARTS": "3",
    }
    return called(["bash", "-c", SKY["run"]], [], directory, **{**named, **more})


@pytest.mark.parametrize(
    ("platform", "first"),
    [(pod, "triquetra-0.triquetra:29500"), (sky, "10.0.0.7:29500")],
    ids=["pods", "sky"],
)
def test_ranks_are_found_by_the_platforms_variables(platform, first, tmp_path):
    for number, is_host in ((0, "true"), (1, "false")):
        where = tmp_path / str(number)
        (call,), status = platform(where, **{"index" if platform is pod else "rank": number})
        assert status == 0 and "--nnodes 2 --nproc-per-node 8" in call
        assert f"--rdzv-endpoint {first}" in call and f"is_host={is_host}," in call
        assert call.endswith("--max-restarts 3 -m trainer.train name=x data.source.path=a b")


@pytest.mark.parametrize(("platform", "key"), [(pod, "index"), (sky, "rank")], ids=["pods", "sky"])
@pytest.mark.parametrize("status", [1, 2, HUNG, PREEMPTED])
def test_the_platform_sees_the_exit_code_of_the_run(platform, key, status, tmp_path):
    _, code = platform(tmp_path, status=status, **{key: 0})
    assert code == status


@pytest.mark.parametrize(("platform", "key"), [(pod, "index"), (sky, "rank")], ids=["pods", "sky"])
def test_what_is_unfit_does_not_train(platform, key, tmp_path):
    (call,), code = platform(tmp_path / "unfit", unfit=69, PREFLIGHT="1", **{key: 0})
    assert "-m trainer preflight" in call and code == 69
    calls, code = platform(tmp_path / "fit", PREFLIGHT="1", **{key: 0})
    assert len(calls) == 2 and code == 0
