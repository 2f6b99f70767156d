"""What will a run need, what bounds it, and which layout is best? Before a GPU hour is spent."""

import os
import sys

if "torch" not in sys.modules:  # what it says of a process group that carries nothing is no news
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
