"""`python -m actors.predictor.trace model=FOLDER text=TEXT out=FOLDER`: record a model's routing of a text in files.

For models that are too slow to be traced again in every epoch; `train` takes the folder as `traces=`. Killed at any time,
the same command goes on where it was; in the end the files are those of a run that was not.
"""

from pydantic import Field
from tqdm import tqdm

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.library_routing import load_resident_model
from actors.predictor.text import TokenStream
from actors.predictor.traces import TracedText, TraceWriter
from actors.predictor.tracing import SAMPLE_WINDOWS, RoutingTracer
from common.errors import ServingError


class TraceArguments(Arguments):
    text: str = Field(
        description="file, folder, or FILE.npz#NAME of token ids: [tokens], or [sentences, tokens] padded with -1",
        min_length=1,
    )
    out: str = Field(description="folder for the traces", min_length=1)
    batch_size: int = Field(16, ge=1, description="windows per forward pass and per shard")
    num_kept: int = Field(30, ge=1, description="experts per token and layer whose logits are kept")


def write_traces(arguments: TraceArguments) -> int:
    """Trace the text into the folder, or the rest of it; returns the number of tokens.

    Raises:
        ConfigError: no such text, or the folder holds traces of another model or text.
    """
    stream = TokenStream(arguments.text, arguments.model, arguments.window_tokens)
    summary = stream.summarise()
    text = TracedText(
        **vars(summary),
        window_tokens=arguments.window_tokens,
        shard_windows=arguments.batch_size,
        dtype=str(arguments.torch_dtype).removeprefix("torch."),
    )
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    tracer = RoutingTracer(model, arguments.model, arguments.num_kept)
    header = tracer.header(*next(stream.batches(SAMPLE_WINDOWS)))
    writer = TraceWriter(arguments.out, header, text)
    done = min(writer.num_shards * arguments.batch_size, summary.num_windows)
    with tqdm(total=summary.num_windows, initial=done, unit="window", dynamic_ncols=True) as progress:
        for token_ids, mask in stream.batches(arguments.batch_size, first=done):
            writer.write(tracer.trace(token_ids, mask))
            progress.update(len(token_ids))
    return summary.num_tokens


def main() -> None:
    arguments = read_command_line(TraceArguments, __doc__)
    try:
        num_tokens = write_traces(arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{num_tokens} tokens traced into {arguments.out}")


if __name__ == "__main__":
    main()
