"""The torch device of a command's option --device."""

import torch


def find(name=None):
    """The torch device of that name; by default a GPU if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the device or does not find it here; or "meta", which has no data.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch says "no such word", "not compiled" and "no driver" by different exceptions
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"no device {str(name)!r} here: {why}") from error
    if device.type == "meta":
        raise ValueError("device 'meta' has no data: expected a device that computes, e.g. 'cpu' or 'cuda'")
    return device
