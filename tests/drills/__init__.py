"""What happens to a run when something fails? Each drill breaks one thing, for real, and says what must hold.

    python -m tests.drills [name ...] [--short]     make drills runs all of them

Ranks are processes that are killed, starved and lied to; nothing of this is in trainer/ (faulty.py puts it
there from outside).
"""
