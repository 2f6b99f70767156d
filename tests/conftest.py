"""Tests run on one thread, without network, on the CPU, with the signals of a program in the foreground, and
never write into the home directory's cache.
"""

import os
import shutil
import signal
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if "CUDA_VISIBLE_DEVICES" not in os.environ:  # the tests are about the CPU, whatever the machine has
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRIQUETRA_HIDES_GPUS": "1"}  # tests/gpu sees them again
IS_XDIST_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not IS_XDIST_WORKER:  # the workers inherit it, so a tokenizer is trained once for all
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="triquetra-test-cache-")

# What was started in the background or by nohup ignores these, and so would every run that a test starts.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

import pytest  # noqa: E402  # after the environment is set
import torch  # noqa: E402

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    if not IS_XDIST_WORKER:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """Byte-level BPE of 300 entries, trained on a few sentences."""
    from tests.streams import TextListSource
    from trainer import data

    texts = TextListSource(["the quick brown fox jumps over the lazy dog; who packs five dozen liquor jugs?"])
    cache_dir = tmp_path_factory.mktemp("cache")
    return data.load_tokenizer("train", source=texts, vocab_size=300, cache_dir=cache_dir)
