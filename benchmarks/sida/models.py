"""Configurations of the Switch Transformers that are trained here, and of Switch-base, whose weights may be random."""

from dataclasses import dataclass

import torch
from transformers import SwitchTransformersConfig

from benchmarks.sida.data.tokens import Vocabulary

AUX_LOSS, Z_LOSS = 0.01, 0.001  # arXiv 2101.03961, section 2.2; ST-MoE, arXiv 2202.08906, section 3
# Of routers' initial weights, as Switch Transformers have it (section 2.4); else they collapse before they have learned.
ROUTER_SCALE = 0.1


@dataclass(frozen=True)
class TrainedShape:
    """Every other layer is sparse."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    encoder_layers: int
    decoder_layers: int


def trained_config(shape: TrainedShape, num_experts: int, vocabulary: Vocabulary) -> SwitchTransformersConfig:
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
        router_aux_loss_coef=AUX_LOSS,
        router_z_loss_coef=Z_LOSS,
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
