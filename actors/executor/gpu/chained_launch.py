"""Launches of decode kernels that overlap: while one ends, the next is already in place (programmatic dependent launch)."""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_FIRST_CAPABILITY = (9, 0)  # Hopper


@triton.jit  # type: ignore[untyped-decorator]
def wait_for_previous(CHAINED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Wait until all kernels before this one are done and seen, then let the next one take its place.

    Every program of a chained kernel begins with it: only what no kernel writes may be read before. So a kernel that
    is done has outlived all before it, and what comes after needs to wait for the last one only. The next one is let in
    no sooner, since it would only wait in the place of programs that have work.

    "Before" may be another stream: in a graph, a kernel that follows nothing but an event of another stream takes its
    place early as well. One that follows both its own stream and an event begins when both are done.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """What a launch of a kernel with `wait_for_previous` is given."""
    if device.type != "cuda" or torch.version.hip is not None:
        return {"CHAINED": False}
    if torch.cuda.get_device_capability(device) < _FIRST_CAPABILITY:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": True}
