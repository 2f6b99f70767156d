"""Three small tasks in the format of trainer/evaluate/tasks.py, written by `python -m tests.tasks`."""
