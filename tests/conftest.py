"""Tests run on one thread, without network, on the CPU, and never write into the home directory's cache."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the tests are about the CPU, whatever the machine has
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRIQUETRA_HIDES_GPUS": "1"}  # tests/gpu sees them again
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:  # the workers inherit it, so a tokenizer is trained once for all
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="triquetra-test-cache-")

import torch  # noqa: E402  # after the environment is set

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    if not IS_XDIST_WORKER:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
