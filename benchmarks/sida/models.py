"""Configurations of the Switch Transformers that are trained here, and of Switch-base, whose weights may be random."""

from dataclasses import dataclass

import torch
from transformers import SwitchTransformersConfig

from benchmarks.sida.data.tokens import Vocabulary


@dataclass(frozen=True)
class RouterTraining:
    """What makes routers sharp and even within two thousand steps.

    The published values (0.1, 1 and 0.01: arXiv 2101.03961, sections 2.2 and 2.4) need many more, and a z-loss keeps
    them soft.
    """

    scale: float = 0.5  # of their initial weights
    speed: float = 5.0  # factor of their learning rate
    aux_loss: float = 0.03  # weight of the load balancing loss


@dataclass(frozen=True)
class TrainedShape:
    """Every other layer is sparse."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int


def trained_config(
    shape: TrainedShape, num_experts: int, vocabulary: Vocabulary, aux_loss: float
) -> SwitchTransformersConfig:
    return SwitchTransformersConfig(
        vocab_size=vocabulary.size,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_kv=shape.d_kv,
        num_heads=shape.num_heads,
        num_layers=shape.encoder_layers,
        num_sparse_encoder_layers=shape.encoder_layers // 2,
        num_decoder_layers=shape.decoder_layers,
        num_sparse_decoder_layers=shape.decoder_layers // 2,
        num_experts=num_experts,
        dropout_rate=0.0,
        router_aux_loss_coef=aux_loss,
        router_z_loss_coef=0.0,
        pad_token_id=vocabulary.pad_id,
        eos_token_id=vocabulary.end_id,
        decoder_start_token_id=vocabulary.pad_id,
    )


@dataclass(frozen=True)
class BaseShape:
    """An encoder, every other layer of which is sparse; the defaults are Switch-base's."""

    vocab_size: int = 32_128
    d_model: int = 768
    d_ff: int = 3072
    d_kv: int = 64
    num_heads: int = 12
    num_layers: int = 12


def base_config(shape: BaseShape, num_experts: int, dtype: torch.dtype) -> SwitchTransformersConfig:
    """A classifier of two labels."""
    return SwitchTransformersConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        d_ff=shape.d_ff,
        d_kv=shape.d_kv,
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        num_sparse_encoder_layers=shape.num_layers // 2,
        num_experts=num_experts,
        dropout_rate=0.0,
        num_labels=2,
        dtype=dtype,
        architectures=["SwitchTransformersForSequenceClassification"],
    )
