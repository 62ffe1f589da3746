"""Which device a name means on this machine, for extraction, training and probes alike."""

import torch


def resolve_device(name: str, local: int = 0) -> torch.device:
    """The device; `auto` is a GPU where there is one, and `cuda` without a number the GPU number `local`.

    local: this process's number on its machine. Raises ValueError for a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name}: cannot be used ({reason}); expected auto, cpu, cuda or cuda:N") from error
    return device
