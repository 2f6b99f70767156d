"""Which of several changes matters, and by how much? `triquetra ablate` (trainer/lab/ablate/__main__.py)."""
