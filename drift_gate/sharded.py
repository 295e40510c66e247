"""DTensor heads (FSDP2, tensor parallel): gathered once a call, gradients sharded again."""

from typing import Any

from torch import Tensor


def gathered(x: Any) -> Tensor:
    """The whole of a DTensor; its gradient is averaged over the ranks and laid out as x is.

    Each rank computes the loss of its own rows, so that the gradient of a rank is one of several
    to be averaged, as DDP and FSDP do. Where all ranks have the same rows the mean changes nothing.
    """
    from torch.distributed.tensor import Partial

    whole: Tensor = x.full_tensor(grad_placements=[Partial("avg")] * x.device_mesh.ndim)
    return whole
