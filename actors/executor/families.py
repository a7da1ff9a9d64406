"""Which of the library's families the runner can drive, and which attention masks they take. Reads configs only."""

from pathlib import Path

from transformers import PretrainedConfig

from common.errors import UnsupportedModelError

# Layers whose whole state is keys and values. Recurrent and convolutional layers keep other state.
_KEY_VALUE_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
# Kinds of them that see less than everything before, with masks of their own.
_LOCAL_LAYERS = {"sliding_attention", "chunked_attention"}


def check_supported(config: PretrainedConfig, folder: str | Path) -> None:
    """
    Raises:
        UnsupportedModelError: a layer needs a cache that the executor does not have.
    """
    others = sorted(set(layer_types(config) or ()) - _KEY_VALUE_LAYERS)
    if others:
        kind = ", ".join(others)
        raise UnsupportedModelError(
            str(folder),
            f"{config.model_type} is not supported yet: it has {kind} layers, this version serves "
            "models whose layers are all full, sliding-window or chunked attention",
        )


def layer_types(config: PretrainedConfig) -> list[str] | None:
    types = getattr(config.get_text_config(), "layer_types", None)
    return list(types) if types else None


def sliding_window(config: PretrainedConfig) -> int | None:
    """The window of the layers that have one, in tokens; None when no layer does."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    types = layer_types(config)
    if not window or (types is not None and "sliding_attention" not in types):
        return None
    return int(window)


def takes_mask_per_layer_type(config: PretrainedConfig) -> bool:
    """Whether the model expects a dict of masks by layer type; the others take one mask for all layers."""
    return not _LOCAL_LAYERS.isdisjoint(layer_types(config) or ())


def attention_chunk(config: PretrainedConfig) -> int | None:
    """The chunk of the layers that see nothing before their own chunk (Llama 4), in tokens; None when no layer does."""
    if "chunked_attention" not in (layer_types(config) or ()):
        return None
    return int(config.get_text_config().attention_chunk_size)


def chunk_of_layer(config: PretrainedConfig, layer_idx: int) -> int | None:
    """The chunk of one decoder layer's attention, in tokens; None where it has none."""
    types = layer_types(config)
    if types is None or types[layer_idx] != "chunked_attention":
        return None
    return attention_chunk(config)


def window_of_layer(config: PretrainedConfig, layer_idx: int) -> int | None:
    """The window of one decoder layer's attention, in tokens; None where it sees everything before."""
    types = layer_types(config)
    if takes_mask_per_layer_type(config) and types is not None and types[layer_idx] != "sliding_attention":
        return None
    return sliding_window(config)
