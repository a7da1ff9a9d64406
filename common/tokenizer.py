"""The tokenizer of a checkpoint folder, when there is one."""

import logging
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import CheckpointError, UnsupportedModelError

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast | None:
    """None when the folder holds no tokenizer: such a model is served by token ids alone.

    Raises:
        CheckpointError: there are tokenizer files but they cannot be read.
        UnsupportedModelError: it is not one of the `tokenizers` library, which incremental decoding needs.
    """
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        logger.warning("%s has no tokenizer: only prompts of token ids can be served, without text", folder)
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(str(folder), f"its tokenizer cannot be read ({error})") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        kind = type(tokenizer).__name__
        raise UnsupportedModelError(str(folder), f"its tokenizer is a {kind}; convert it to a tokenizer.json")
    return tokenizer
