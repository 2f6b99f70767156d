"""Triquetra: mixture-of-experts pretraining with HSDP x EP, from a laptop CPU to a GPU cluster."""

__version__ = "0.1.0"
