"""The tokenizer of the Switch models: the reference model's pieces, and the special tokens that T5 models need."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from models.reference.corpus import END_OF_TEXT, FOLDER

NUM_SENTINELS = 64  # spans of one window
PAD, SEPARATOR = "<pad>", "<sep>"
NO_TOKEN = -1  # pads the rows of an array of examples, as `actors.predictor.text` reads them
_DOCUMENTS = 512  # whose encodings, a hundred bytes per token, are in memory at once
_VOCABULARY_MULTIPLE = 64  # matrices of aligned sizes are faster

Ids = npt.NDArray[np.int16]


class Vocabulary:
    """Pieces of the reference model's byte-level BPE, 6144 of them, and ids of special tokens behind them."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
        sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
        self.tokenizer.add_special_tokens(
            [AddedToken(name, special=True) for name in (PAD, SEPARATOR, *sentinels)]
        )
        self.end_id, self.pad_id = self._id(END_OF_TEXT), self._id(PAD)
        self.separator_id, self.first_sentinel_id = self._id(SEPARATOR), self._id(sentinels[0])
        size = self.tokenizer.get_vocab_size()
        self.size = -(-size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        assert isinstance(found, int)
        return found

    def encode_documents(self, texts: Sequence[str], most: int) -> Ids:
        """The first `most` ids of the texts, each of which is closed by the end of text."""
        rows: list[Ids] = []
        for start in range(0, len(texts), _DOCUMENTS):
            encodings = self.tokenizer.encode_batch(list(texts[start : start + _DOCUMENTS]))
            rows += [np.asarray([*encoding.ids, self.end_id], np.int16) for encoding in encodings]
            if sum(map(len, rows)) >= most:
                break
        return np.concatenate(rows)[:most]

    def encode_examples(self, examples: Sequence[Sequence[str]]) -> list[Ids]:
        """Each example's texts with a separator between, and the end of text."""
        flat = self.tokenizer.encode_batch([text for example in examples for text in example])
        encodings = iter(flat)
        rows = []
        for example in examples:
            ids: list[int] = []
            for _ in example:
                ids += [*next(encodings).ids, self.separator_id]
            rows.append(np.asarray([*ids[:-1], self.end_id], np.int16))
        return rows

    def save(self, folder: Path) -> None:
        """Write the tokenizer in the Hugging Face layout."""
        PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, sep_token=SEPARATOR
        ).save_pretrained(folder)


def padded(rows: Sequence[Ids]) -> Ids:
    """[rows, longest], NO_TOKEN where a row is shorter."""
    array = np.full((len(rows), max(map(len, rows), default=0)), NO_TOKEN, np.int16)
    for target, row in zip(array, rows, strict=True):
        target[: len(row)] = row
    return array
