"""Rates that bound a paged decode step: of the link, by copy engine and by kernel, and of device memory."""

import statistics
from collections.abc import Callable
from itertools import cycle, islice

import torch

from actors.executor.gpu.pager import DevicePager
from actors.executor.slots import SlotPool
from benchmarks.gpu.baselines import measured_bandwidths, time_ms
from benchmarks.gpu.paged_model import HostModel

RUNS = 9
FETCHED_AT_ONCE = 32  # experts
FETCH_LAYERS = 4
COPIED_BYTES = 1 << 30
READ_ELEMENTS = {"cuda": 1 << 29, "cpu": 1 << 22}  # of 4 bytes


def measure_rates(host: HostModel) -> dict[str, float]:
    """GB/s, medians of RUNS. `device_copy` counts bytes read and bytes written; `link` is the best of host to device:
    copies of small experts one by one are bound by their launches.
    """
    general, copy_engine = measured_bandwidths(host.device), copy_engine_gb_per_s(host)
    return {
        **general,
        "device_read": round(device_read_gb_per_s(host.device), 1),
        "link_copy_engine": round(copy_engine, 2),
        "link_fetch_kernel": round(fetch_kernel_gb_per_s(host), 2),
        "link": round(max(copy_engine, general.get("host_pinned_to_device", 0.0)), 2),
    }


def device_read_gb_per_s(device: torch.device) -> float:
    elements = torch.ones(READ_ELEMENTS[device.type], device=device)
    return _gb_per_s(elements.sum, elements.nbytes, device)


def copy_engine_gb_per_s(host: HostModel) -> float:
    """Whole experts from where they lie registered, copied into slots one after the other; no kernel runs."""
    slab_bytes = host.source.layout.slab_bytes
    keys = [(layer, expert) for layer in range(host.num_layers) for expert in range(host.num_experts)]
    keys = keys[: max(1, COPIED_BYTES // slab_bytes)]
    slabs = [host.source.fetch(*key) for key in keys]
    slots = SlotPool(host.layout, min(len(slabs), FETCHED_AT_ONCE), host.device).elements.unbind()

    def copy() -> None:
        for slab, slot in zip(slabs, islice(cycle(slots), len(slabs)), strict=True):
            host.host_experts.copy(slab, slot)

    return _gb_per_s(copy, len(slabs) * slab_bytes, host.device)


def fetch_kernel_gb_per_s(host: HostModel) -> float:
    """The pager's own kernels, when a layer misses FETCHED_AT_ONCE experts and nothing computes meanwhile.

    Choosing the slots counts too; it takes about a hundredth of the copies' time.
    """
    rows = max(1, min(FETCHED_AT_ONCE, host.num_experts // 2) // host.top_k)
    num_slots, num_layers = rows * host.top_k, min(FETCH_LAYERS, host.num_layers)
    pools = [SlotPool(host.layout, num_slots, host.device) for _ in range(num_layers)]
    pager = DevicePager(host.source, pools, host.num_experts, host.host_experts)
    every = torch.arange(host.num_experts // num_slots * num_slots, dtype=torch.int32, device=host.device)
    needs = cycle(every.view(-1, rows, host.top_k).unbind())  # none holds an expert of the one before
    active = torch.full((1,), rows, dtype=torch.int32, device=host.device)

    def fetch() -> None:
        pager.begin_pass()
        ids = next(needs)
        for layer in range(num_layers):
            for _ in pager.waves(layer, ids, active):
                pass

    return _gb_per_s(fetch, num_layers * num_slots * host.source.layout.slab_bytes, host.device)


def _gb_per_s(call: Callable[[], object], num_bytes: int, device: torch.device) -> float:
    time_ms(call, 2, device)
    return num_bytes / statistics.median(time_ms(call, RUNS, device)) / 1e6
