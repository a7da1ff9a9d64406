"""What a checkpoint folder's config says about the model: its MoE layers, experts and sizes. Reads no weights.

Every fact is taken from the library's own model, built on the meta device, so that nothing here knows a family.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from common.errors import CheckpointError, UnsupportedModelError
from common.own_experts import own_model_class
from common.own_experts.model import OwnExpertsModel

# The library's families disagree on the name of "experts per token".
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class MoeArchitecture:
    """The shape of a model with MoE layers. A *layer* is an MoE layer here, counted from 0; dense ones do not count.

    An encoder's layers come first, then the decoder's.
    """

    model_type: str
    experts_modules: tuple[str, ...]  # qualified module name per MoE layer, in forward order
    num_experts: int
    top_k: int
    expert_shapes: dict[str, tuple[int, ...]]  # parameter name -> shape of one expert, in the module's order
    hidden_size: int
    vocab_size: int
    max_context_tokens: int
    num_encoder_layers: int = 0  # MoE layers of an encoder; all of them where the model is nothing else
    is_encoder_decoder: bool = False
    labels: tuple[str, ...] = ()  # of a classifier, in the order of its logits
    transposed_tensors: tuple[str, ...] = ()  # of `expert_shapes`: a checkpoint holds the transposed matrices

    @property
    def num_layers(self) -> int:
        return len(self.experts_modules)


def load_config(folder: str | Path) -> PretrainedConfig:
    """
    Raises:
        CheckpointError: the folder has no config.json that the library can read.
        UnsupportedModelError: the library does not know the architecture.
    """
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(
            str(folder), "no config.json there; give the folder of a Hugging Face checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except ValueError as error:
        raise UnsupportedModelError(str(folder), str(error).splitlines()[0]) from error
    except OSError as error:
        raise CheckpointError(str(folder), f"config.json cannot be read ({error})") from error
    assert isinstance(config, PretrainedConfig)
    return config


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | type[AutoModelForCausalLM]:
    """Whose `from_pretrained` loads the model: ours for families outside the experts registry, else the library's."""
    return own_model_class(config) or AutoModelForCausalLM


def meta_model(config: PretrainedConfig, folder: str | Path) -> PreTrainedModel:
    """The model without storage (meta device).

    Raises:
        UnsupportedModelError: the architecture has no causal language model in the library.
    """
    own_class = own_model_class(config)
    try:
        with torch.device("meta"):
            model = own_class(config) if own_class else AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(
            str(folder), f"{config.model_type} is no causal language model"
        ) from error
    assert isinstance(model, PreTrainedModel)
    return model


def find_experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the library routes through its experts registry, by qualified name, in forward order."""
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def count_encoder_layers(experts_modules: Iterable[str]) -> int:
    """How many of these experts modules belong to an encoder. Args: experts_modules: qualified names."""
    return sum("encoder" in name.split(".") for name in experts_modules)


def is_experts_module(module: nn.Module) -> bool:
    """Whether the library's `use_experts_implementation` decorated this module's class."""
    return {"has_gate", "has_bias", "is_transposed"} <= vars(module).keys()


def describe_architecture(folder: str | Path) -> MoeArchitecture:
    """
    Raises:
        CheckpointError: no readable config.json.
        UnsupportedModelError: not a causal language model whose experts go through the library's registry.
    """
    config = load_config(folder)
    return architecture_of(meta_model(config, folder), folder)


def architecture_of(model: PreTrainedModel, folder: str | Path) -> MoeArchitecture:
    """`describe_architecture` of a model that is built already; `folder` is for the messages.

    Raises:
        UnsupportedModelError: as `describe_architecture`.
    """
    config = model.config
    experts = find_experts_modules(model)
    if not experts:
        raise UnsupportedModelError(
            str(folder), f"{config.model_type} has no MoE layer in the library's experts registry"
        )
    shapes = {name: per_expert_shapes(module) for name, module in experts.items()}
    first = next(iter(shapes.values()))
    if any(shape != first for shape in shapes.values()):
        raise UnsupportedModelError(str(folder), "its MoE layers have experts of different shapes")
    num_experts = {module.get_parameter("down_proj").shape[0] for module in experts.values()}
    text = config.get_text_config()
    return MoeArchitecture(
        model_type=config.model_type,
        experts_modules=tuple(experts),
        num_experts=num_experts.pop(),
        top_k=_top_k(model, folder),
        expert_shapes=first,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        max_context_tokens=_max_context_tokens(model),
        num_encoder_layers=count_encoder_layers(experts),
        is_encoder_decoder=bool(config.is_encoder_decoder) and model.can_generate(),
        labels=() if model.can_generate() else tuple(config.id2label[i] for i in range(config.num_labels)),
        transposed_tensors=tuple(getattr(next(iter(experts.values())), "transposed_tensors", ())),
    )


def per_expert_shapes(experts: nn.Module) -> dict[str, tuple[int, ...]]:
    """The parameters of an experts module that have one row per expert, without that leading dimension."""
    num_experts = experts.get_parameter("down_proj").shape[0]
    return {
        name: tuple(parameter.shape[1:])
        for name, parameter in experts.named_parameters(recurse=False)
        if parameter.shape[0] == num_experts
    }


def _max_context_tokens(model: PreTrainedModel) -> int:
    config = model.config.get_text_config()
    if isinstance(model, OwnExpertsModel) and model.usual_context_tokens is not None:
        return int(getattr(config, "n_positions", model.usual_context_tokens))
    return int(config.max_position_embeddings)


def _top_k(model: PreTrainedModel, folder: str | Path) -> int:
    if isinstance(model, OwnExpertsModel) and model.fixed_top_k is not None:
        return model.fixed_top_k
    config = model.config.get_text_config()
    parts = (config, getattr(config, "ffn_config", None))
    values = [getattr(part, name, None) for part in parts for name in _TOP_K_NAMES]
    found = [value[0] if isinstance(value, list) else value for value in values if value]
    if not found:
        raise UnsupportedModelError(
            str(folder), f"config.json names no experts per token ({', '.join(_TOP_K_NAMES)})"
        )
    return int(found[0])
