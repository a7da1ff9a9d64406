"""`python -m actors.predictor.trace model=FOLDER text=TEXT out=FOLDER`: record a model's routing of a text in files.

For models that are too slow to be traced again in every epoch; `train` takes the folder as `traces=`. Killed at any time,
the same command goes on where it was; in the end the files are those of a run that was not.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.library_routing import load_resident_model
from actors.predictor.text import TokenStream
from actors.predictor.traces import TracedText, TraceWriter
from actors.predictor.tracing import SAMPLE_WINDOWS, RoutingTracer, Source, decoder_inputs
from common.errors import ConfigError, ServingError


class TraceArguments(Arguments):
    text: str = Field(
        description="file, folder, or FILE.npz#NAME of token ids: [tokens], or [sentences, tokens] padded with -1",
        min_length=1,
    )
    out: str = Field(description="folder for the traces", min_length=1)
    batch_size: int = Field(16, ge=1, description="windows per forward pass and per shard")
    num_kept: int = Field(30, ge=1, description="experts per token and layer whose logits are kept")
    stack: Literal["auto", "encoder", "decoder"] = Field(
        "auto", description="whose layers; auto: the encoder's, if there is one"
    )
    source: str | None = Field(
        None, description="stack=decoder beside an encoder: what that reads, for each window of the text"
    )


def write_traces(arguments: TraceArguments) -> int:
    """Trace the text into the folder, or the rest of it; returns the number of tokens.

    Raises:
        ConfigError: no such text, or the folder holds traces of another model or text.
    """
    reader = _Reader(arguments)
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    stack = None if arguments.stack == "auto" else arguments.stack
    tracer = RoutingTracer(model, arguments.model, arguments.num_kept, stack)
    header = tracer.header(*next(reader.batches(model, SAMPLE_WINDOWS)))
    writer = TraceWriter(arguments.out, header, reader.text)
    done = min(writer.num_shards * arguments.batch_size, reader.text.num_windows)
    with tqdm(total=reader.text.num_windows, initial=done, unit="window", dynamic_ncols=True) as progress:
        for batch in reader.batches(model, arguments.batch_size, first=done):
            writer.write(tracer.trace(*batch))
            progress.update(len(batch[0]))
    return reader.text.num_tokens


class _Reader:
    """The windows that a stack reads, and beside each, for a decoder with an encoder, what that one reads."""

    def __init__(self, arguments: TraceArguments) -> None:
        self._stream = TokenStream(arguments.text, arguments.model, arguments.window_tokens)
        self._source: TokenStream | None = None
        summary = self._stream.summarise()
        if arguments.source is not None:
            self._source = TokenStream(arguments.source, arguments.model, arguments.window_tokens)
            source = self._source.summarise()
            if source.num_windows != summary.num_windows:
                allowed = f"{summary.num_windows} windows, as in the text; it has {source.num_windows}"
                raise ConfigError("source", arguments.source, allowed)
            summary = replace(summary, digest=f"{summary.digest} {source.digest}")
        dtype = str(arguments.torch_dtype).removeprefix("torch.")
        self.text = TracedText(dtype, arguments.window_tokens, arguments.batch_size, **vars(summary))

    def batches(
        self, model: PreTrainedModel, batch_size: int, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor, Source | None]]:
        windows = self._stream.batches(batch_size, first)
        if self._source is None:
            yield from ((token_ids, mask, None) for token_ids, mask in windows)
            return
        for (targets, mask), source in zip(windows, self._source.batches(batch_size, first), strict=True):
            yield decoder_inputs(model, targets), mask, source


def main() -> None:
    arguments = read_command_line(TraceArguments, __doc__)
    try:
        num_tokens = write_traces(arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{num_tokens} tokens traced into {arguments.out}")


if __name__ == "__main__":
    main()
