"""Which of several changes matters, and by how much? `python -m trainer.ablate` (trainer/ablate/__main__.py)."""
