"""The one place that chooses a device."""

from __future__ import annotations

import re

import torch

_KNOWN = re.compile(r"auto|cpu|mps|(cuda|xpu)(:[0-9]{1,3})?")


def pick(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: there is no such device; names it.
    """
    if not _KNOWN.fullmatch(name):
        raise ValueError(f"device is {name!r}, which is none; use auto, cpu, cuda, cuda:1 and so on, mps or xpu")
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}, which is not to be had here ({error}); use cpu or auto") from error
    return device
