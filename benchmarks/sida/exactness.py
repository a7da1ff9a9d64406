"""Whether the engine with few slots and the routers' own decisions answers as with every expert in a slot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from actors.executor.build import build_engine
from actors.executor.expert_source import CheckpointExpertSource
from benchmarks.sida.answer_sink import AnswerSink
from common.checkpoint import Checkpoint
from common.config import ServingConfig
from common.generation import GenerationRequest, SamplingParams

FEW_SLOTS = "25%"


def compare_slots(
    folder: Path, sentences: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Args: folder: of a classifier."""
    few, every = (_logits(folder, sentences, device, dtype, slots) for slots in (FEW_SLOTS, "all"))
    return {
        "sentences": len(sentences),
        "slots": FEW_SLOTS,
        "largest_logit_difference": float((few - every).abs().max()),
        "logits_equal": bool(torch.equal(few, every)),
    }


def _logits(
    folder: Path, sentences: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype, slots: str
) -> torch.Tensor:
    config = ServingConfig.model_validate(
        {
            "model": str(folder),
            "expert_slots": slots,
            "max_batch_size": 1,
            "device": device,
            "dtype": str(dtype).removeprefix("torch."),
            "prefetch": False,
        }
    )
    engine = build_engine(config, CheckpointExpertSource(Checkpoint.open(folder)))
    engine.start()
    try:
        logits = []
        for number, sentence in enumerate(sentences):  # alone: sums of a larger batch round otherwise
            sink = AnswerSink()
            engine.submit(GenerationRequest(f"s{number}", sentence, SamplingParams()), sink)
            logits.append(sink.result().label_logits)
        return torch.tensor(logits)
    finally:
        engine.stop()
