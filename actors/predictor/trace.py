"""`python -m actors.predictor.trace model=FOLDER text=TEXT out=FOLDER`: record a model's routing of a text in files.

For models that are too slow to be traced again in every epoch; `train` takes the folder as `traces=`.
"""

from pydantic import Field
from tqdm import tqdm

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.library_routing import load_resident_model
from actors.predictor.text import read_tokens
from actors.predictor.traces import TraceWriter, windows
from actors.predictor.tracing import LiveTraces, RoutingTracer
from common.errors import ServingError


class TraceArguments(Arguments):
    text: str = Field(description="file, folder, or FILE.npz#NAME of token ids", min_length=1)
    out: str = Field(description="folder for the traces", min_length=1)
    batch_size: int = Field(16, ge=1, description="windows per forward pass and per shard")
    num_kept: int = Field(30, ge=1, description="experts per token and layer whose logits are kept")


def write_traces(arguments: TraceArguments) -> int:
    """Trace the text into the folder; returns the number of tokens.

    Raises:
        ConfigError: no such text.
        UnsupportedModelError: router decisions that cannot be recorded or learned.
    """
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    token_ids, mask = windows(read_tokens(arguments.text, arguments.model), arguments.window_tokens)
    source = LiveTraces(RoutingTracer(model, arguments.model, arguments.num_kept), token_ids, mask)
    writer = TraceWriter(arguments.out, source.header)
    with tqdm(total=int(mask.sum()), unit="tokens", unit_scale=True) as progress:
        for batch in source.batches(arguments.batch_size, None):
            writer.write(batch)
            progress.update(batch.num_tokens)
    return int(mask.sum())


def main() -> None:
    arguments = read_command_line(TraceArguments, __doc__)
    try:
        num_tokens = write_traces(arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{num_tokens} tokens traced into {arguments.out}")


if __name__ == "__main__":
    main()
