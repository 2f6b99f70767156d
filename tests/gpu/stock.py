"""What does a stock image with torch 2.11 lack? One name, for an annotation of torchtitan.

The trainer itself asks for torch 2.13: this stands here, and nowhere in trainer/. Import it before that.
"""

import torch.distributed.fsdp as fsdp

if not hasattr(fsdp, "DataParallelMeshDims"):
    fsdp.DataParallelMeshDims = object
