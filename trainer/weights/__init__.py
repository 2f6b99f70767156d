"""Weights in and out: from a published AfmoeForCausalLM (`pretrained`), and as one (`export`)."""
