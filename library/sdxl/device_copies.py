"""Copies between host and GPU that the host does not wait for."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return `tensor` on `device`. A copy to a GPU goes through pinned memory and is queued behind the GPU's work.

    An ordinary copy would first let the host wait until the GPU has nothing left to do.
    """
    device = torch.device(device)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class HostCopy:
    """A copy of a tensor to host memory that is under way; `wait` returns it.

    It is queued when this object is made: `wait` waits for the GPU's work up to then, not for later work.
    """

    def __init__(self, tensor: torch.Tensor):
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        self._copy = tensor.to("cpu", non_blocking=tensor.is_cuda)  # torch pins the memory of such a copy
        if self._arrived is not None:
            self._arrived.record()

    def wait(self) -> torch.Tensor:
        """Return the copy, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy
