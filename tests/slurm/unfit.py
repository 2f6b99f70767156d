"""`triquetra preflight` on a node that is made unfit from outside: slow, and late.

python -m tests.slurm.unfit preflight ...
"""

import sys
import time

from trainer.__main__ import main
from trainer.preflight import hosts, speed
from trainer.preflight.place import host_name

if __name__ == "__main__":
    if host_name() == "node2":
        flops, now = speed.product_flops, time.time
        speed.product_flops = lambda *on: flops(*on) / 10
        hosts.time = type("Late", (), {"time": staticmethod(lambda: now() - 60)})
    sys.exit(main())
