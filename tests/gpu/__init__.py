"""The first GPU hour: does the trainer compute on a GPU what it computes on a CPU, and how fast?

    python -m tests.gpu            # or `make gpu`: one GPU, at most eight minutes
    RANKS=8 python -m tests.gpu    # the list for eight GPUs

docs/benchmarks/gpu.md says what each stage proves and what to bring along to a machine without network.
Each stage is a file here: `SIZES` for a GPU and for a CPU, and `CHECKS`, functions of a `Bench` and a size.
On a CPU the same functions run at tiny sizes (tests/test_gpu_suite.py): a slip of the pen costs no GPU hour.
"""
