"""The corpus of the reference model: the running Python's standard library, its split, its tokenizer, its tokens.

Reads local files only. The split is by file and fixed by the lists below, so any process that runs the same
Python gets the same held-out text.
"""

import argparse
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.reference.standalone import standalone_documents

FOLDER = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 6144
MAX_TOKENS = 2048  # the context the model is trained with

# Scores are reported on these files; nothing of the training sees them.
HELD_OUT = (
    "bisect.py",
    "colorsys.py",
    "concurrent/futures/thread.py",
    "configparser.py",
    "copy.py",
    "csv.py",
    "fnmatch.py",
    "fractions.py",
    "getopt.py",
    "graphlib.py",
    "heapq.py",
    "html/parser.py",
    "json/decoder.py",
    "queue.py",
    "sched.py",
    "shlex.py",
    "string.py",
    "textwrap.py",
    "timeit.py",
    "urllib/robotparser.py",
    "zipapp.py",
)

# The best step is chosen on these files, so that the held-out score owes nothing to the choice.
VALIDATION = (
    "asyncio/queues.py",
    "bdb.py",
    "cmd.py",
    "contextlib.py",
    "filecmp.py",
    "ftplib.py",
    "gzip.py",
    "json/encoder.py",
    "netrc.py",
    "pprint.py",
    "statistics.py",
    "unittest/runner.py",
    "xmlrpc/server.py",
)

# Not source that a person wrote: character tables, generated data, deliberately broken syntax.
EXCLUDED = (
    "*/site-packages/*",
    "site-packages/*",
    "_sysconfigdata*",
    "config-*",
    "encodings/aliases.py",
    "html/entities.py",
    "lib2to3/tests/data/*",
    "pydoc_data/topics.py",
    "stringprep.py",
    "test/tokenizedata/*",
)
TABLE_MARKS = ("decoding_table = (", "decoding_map = codecs.make_identity_dict")

# Indentation is one piece and newlines are their own, so a prompt may end after a colon, a newline or an
# indentation and still be cut as the training text was.
PIECES = r"(?<=\n)[ \t]+| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\n+|[ \t]+(?![^ \t\n])|\s"


@dataclass(frozen=True)
class Corpus:
    """Sources by path relative to the standard library, in three disjoint parts."""

    train: Mapping[str, str]
    validation: Mapping[str, str]
    held_out: Mapping[str, str]


def stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def read_corpus(root: Path | None = None) -> Corpus:
    """Read and split the standard library; the own tests of unseen modules are in no part.

    Raises:
        FileNotFoundError: a file of the split is not in this Python.
    """
    sources = dict(_read_sources(root or stdlib_root()))
    unseen = set(HELD_OUT) | set(VALIDATION)
    if missing := sorted(unseen - sources.keys()):
        raise FileNotFoundError(f"{', '.join(missing)} not found under {root or stdlib_root()}")
    own_tests = {f"test_{PurePosixPath(name).stem}.py" for name in unseen}
    train = {
        name: text
        for name, text in sources.items()
        if name not in unseen and PurePosixPath(name).name not in own_tests
    }
    validation, held_out = ({name: sources[name] for name in names} for names in (VALIDATION, HELD_OUT))
    return Corpus(train, validation, held_out)


def join_documents(texts: Iterable[str]) -> str:
    """One string, every document closed by the end-of-text token; tokenize it for the token stream."""
    return "".join(f"{text}{END_OF_TEXT}" for text in texts)


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer; the end-of-text token has id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer in the Hugging Face layout."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> npt.NDArray[np.uint16]:
    """[tokens] uint16: all documents, each closed by the end-of-text token."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate([np.asarray(document, dtype=np.uint16) for document in ids])


def _read_sources(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if any(fnmatch(name, pattern) for pattern in EXCLUDED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the tests of other source encodings
        if text.strip() and not any(mark in text for mark in TABLE_MARKS):
            yield name, text


def _prepare(corpus: Corpus, out: Path) -> None:
    """Train and save the tokenizer, write heldout.txt, and store the encoded parts in `out`.

    The part `train` is the files and then the documents cut from them. The tokenizer learns from the files alone.
    """
    tokenizer = train_tokenizer(corpus.train.values())
    save_tokenizer(tokenizer, FOLDER)
    write_held_out(corpus, FOLDER / "heldout.txt")
    parts = {
        "files": list(corpus.train.values()),
        "standalone": standalone_documents(corpus.train),
        "validation": list(corpus.validation.values()),
        "held_out": list(corpus.held_out.values()),
    }
    encoded = {name: encode(tokenizer, texts) for name, texts in parts.items()}
    for name, texts in parts.items():
        num_bytes = sum(len(text.encode()) for text in texts)
        print(f"{name}: {len(texts)} documents, {num_bytes} bytes, {encoded[name].size} tokens")
    encoded["train"] = np.concatenate([encoded.pop("files"), encoded.pop("standalone")])
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, **encoded)  # type: ignore[arg-type]  # numpy's stub takes the names for options


def write_held_out(corpus: Corpus, out: Path) -> None:
    out.write_text(join_documents(corpus.held_out.values()), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the reference model's corpus.")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--out", type=Path, help="train the tokenizer, encode the corpus into this .npz")
    action.add_argument("--held-out", type=Path, help="only write the held-out sources here, as one text")
    args = parser.parse_args()
    if args.held_out:
        write_held_out(read_corpus(), args.held_out)
    else:
        _prepare(read_corpus(), args.out)


if __name__ == "__main__":
    main()
