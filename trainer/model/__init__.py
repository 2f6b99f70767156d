"""AFMoE, the architecture of the Trinity models, on torchtitan's modules."""
