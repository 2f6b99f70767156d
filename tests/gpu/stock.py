"""What does a stock image with torch 2.11 lack? A name for torchtitan, and a collective's newer name.

The trainer itself asks for torch 2.13: this stands here, and nowhere in trainer/. Import it before that.
"""

import torch.distributed as dist
import torch.distributed.fsdp as fsdp

if not hasattr(fsdp, "DataParallelMeshDims"):
    fsdp.DataParallelMeshDims = object
if not hasattr(dist, "all_gather_single"):
    dist.all_gather_single = dist.all_gather_into_tensor
