"""Examples of a task as padded batches on a device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sida.data.build import TaskPart
from benchmarks.sida.data.tokens import NO_TOKEN

_MAX_EXAMPLES = 512


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # [examples, tokens] int64, 0 where padded
    mask: Tensor  # [examples, tokens] bool
    labels: Tensor  # [examples] int64


def batches(
    part: TaskPart, batch_tokens: int, device: torch.device, generator: torch.Generator | None = None
) -> Iterator[Batch]:
    """Every example once: by length, so that little is padded, or in the generator's order.

    Args:
        batch_tokens: of a batch at most, padding included; but a batch holds one example at least.
    """
    longest = part.ids.shape[1]
    count = max(1, min(_MAX_EXAMPLES, batch_tokens // longest))
    ids, labels = (torch.from_numpy(each).to(device) for each in (part.ids, part.labels))
    lengths = torch.from_numpy(part.lengths)
    order = (
        lengths.argsort(stable=True) if generator is None else torch.randperm(len(ids), generator=generator)
    )
    for rows in order.split(count):
        chosen = rows.to(device)
        here = ids[chosen, : int(lengths[rows].max())].long()
        mask = here != NO_TOKEN
        yield Batch(here.masked_fill(~mask, 0), mask, labels[chosen])
