"""What a task's score must beat: always one answer, and a linear model over counts of tokens."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.sida.data.build import TaskPart
from benchmarks.sida.data.tokens import NO_TOKEN

_EPOCHS, _MIN_STEPS, _BATCH = 8, 300, 128
_LEARNING_RATE, _WEIGHT_DECAY = 1e-2, 0.1
_NUM_SCALES = 3


@dataclass(frozen=True)
class Baselines:
    """Shares of right answers on the test part."""

    majority: float
    bag_of_tokens: float


def score_baselines(
    train: TaskPart, test: TaskPart, vocab_size: int, separator_id: int, seed: int
) -> Baselines:
    """The linear model sees how often each token is in the first text, in the second, and in both, and the lengths."""
    torch.manual_seed(seed)
    model = _Linear(vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    counts, labels = _features(train, vocab_size, separator_id), torch.from_numpy(train.labels)
    steps_of_epoch = -(-len(labels) // _BATCH)
    for _ in range(max(_EPOCHS, -(-_MIN_STEPS // steps_of_epoch))):
        for rows in torch.randperm(len(labels)).split(_BATCH):
            loss = functional.binary_cross_entropy_with_logits(model(counts, rows), labels[rows].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    counts, labels = _features(test, vocab_size, separator_id), torch.from_numpy(test.labels)
    with torch.no_grad():
        answers = model(counts, torch.arange(len(labels))) > 0
    share = float(labels.float().mean())
    return Baselines(max(share, 1 - share), float((answers == labels.bool()).float().mean()))


@dataclass(frozen=True)
class _Counts:
    ids: Tensor  # [examples, tokens], numbers of features: token + vocab * (first, second or both); padded
    scales: Tensor  # [examples, _NUM_SCALES]: lengths, and the share of tokens in both
    padding: int


class _Linear(nn.Module):
    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.per_token = nn.Parameter(torch.zeros(3 * vocab_size + 1))
        self.per_scale = nn.Linear(_NUM_SCALES, 1)

    def forward(self, counts: _Counts, rows: Tensor) -> Tensor:
        """[rows] logits."""
        ids = counts.ids[rows]
        of_tokens = (self.per_token[ids] * (ids != counts.padding)).sum(1)
        output: Tensor = of_tokens + self.per_scale(counts.scales[rows]).squeeze(1)
        return output


def _features(part: TaskPart, vocab_size: int, separator_id: int) -> _Counts:
    rows, scales = [], []
    for ids in part.ids.tolist():
        tokens = [token for token in ids if token != NO_TOKEN]
        place = tokens.index(separator_id) if separator_id in tokens else len(tokens)
        first, second = tokens[:place], tokens[place + 1 :]
        both = list((Counter(first) & Counter(second)).elements())
        rows.append(
            torch.tensor(
                first + [token + vocab_size for token in second] + [token + 2 * vocab_size for token in both]
            )
        )
        scales.append([len(first) / 20, len(second) / 20, len(both) / max(1, len(second))])
    padding = 3 * vocab_size
    return _Counts(
        nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding),
        torch.tensor(scales),
        padding,
    )
