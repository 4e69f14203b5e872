"""Numbers from the host to the device, without the host waiting for the device.

``torch.tensor(numbers, device="cuda")`` copies from pageable memory, and CUDA lets the host wait
for all queued work first. With asynchronous scheduling that work is the step before, so every
eviction would cost the overlap of two steps. From pinned memory the copy is queued like a kernel.
Torch's allocator of pinned memory gives a block to nobody else before the copies out of it have
run.
"""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d


def upload(
    numbers: Sequence[int] | np.ndarray | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """A copy on ``device``, to be used by what is queued there from now on.

    Args:
        numbers: integers become int64; arrays and tensors (on the host) keep their dtype. On a CPU
            the result may share their memory, so they are not to be written to any more.
        device: of the caller's current stream.
    """
    if isinstance(numbers, (np.ndarray, torch.Tensor)):
        return async_tensor_h2d(numbers, device=device)
    return async_tensor_h2d(list(numbers), device=device, dtype=torch.int64)
