"""One run: put together, stepped, judged, saved, gone back. The loop over its steps is trainer/train.py."""
