"""AFMoE, the architecture of the Trinity models, on torchtitan's modules."""

from trainer.model.compiled import compiling_when_called

with compiling_when_called():
    import torchtitan.models.common  # noqa: F401
