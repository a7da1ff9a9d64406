"""`python -m actors.predictor.evaluate model=FOLDER text=TEXT`: what a hash function is worth on text it has not seen.

Recall of the routers' choice per layer, how well scaling factors and probabilities are calibrated, perplexity with the
model's own routing and with the predicted one (teacher-forced, every expert resident), and the time it takes on this
machine's CPU.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.calibration import CalibrationScores, score_calibration
from actors.predictor.hash_function import find_hash_function, load_hash_function
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.network import HashFunction
from actors.predictor.predictor import HashFunctionPredictor
from actors.predictor.text import read_windows
from actors.predictor.tracing import LiveTraces, RoutingTracer, decoder_inputs
from actors.predictor.training import recall_per_layer
from common.checkpoint import Checkpoint
from common.errors import ConfigError, ServingError

TIMED_TOKENS = 512
TIMED_RUNS = 7

Routing = Callable[["Window"], AbstractContextManager[None]]


class EvaluateArguments(Arguments):
    text: str = Field(
        description="file, folder, or FILE.npz#NAME of token ids; of what the encoder reads, if there is one",
        min_length=1,
    )
    targets: str | None = Field(
        None,
        description="encoder-decoder: what the decoder writes for each window of the text, for the perplexity",
    )
    hash_function: str = Field(
        "auto", description="folder; auto: the one in the model's folder", min_length=1
    )
    decoder_function: str | None = Field(
        None, description="encoder-decoder: folder of a hash function of the decoder, to route there, too"
    )
    batch_size: int = Field(16, ge=1, description="windows per forward pass")
    max_tokens: int = Field(10**9, ge=2, description="of the text")
    out: str | None = Field(None, description="JSON file to write")


@dataclass(frozen=True)
class Evaluation:
    model_fingerprint: str
    network: str
    top_k: int
    num_tokens: int
    recall: list[float]  # [layers], of the true top k
    recall_2k: list[float]  # [layers], of the true top k among twice as many predicted ones
    calibration: CalibrationScores
    perplexity_exact: float | None  # None for an encoder alone
    perplexity_predicted: float | None
    ms_per_512_tokens: float  # median on the CPU, one prompt
    torch_threads: int
    device: str
    dtype: str

    @property
    def mean_recall(self) -> float:
        return sum(self.recall) / len(self.recall)


@dataclass(frozen=True)
class Window:
    """What a model reads at once: a batch of windows. Without `targets` they are the text itself."""

    token_ids: Tensor  # [windows, tokens] int64
    mask: Tensor  # [windows, tokens] bool
    targets: Tensor | None = None  # [windows, target tokens] int64, of a decoder beside an encoder
    target_mask: Tensor | None = None
    decoder_ids: Tensor | None = (
        None  # [windows, target tokens], what the decoder reads: the targets, one later
    )

    def to(self, device: torch.device) -> "Window":
        parts: dict[str, Any] = {
            name: None if part is None else part.to(device) for name, part in vars(self).items()
        }
        return Window(**parts)


def evaluate(arguments: EvaluateArguments) -> Evaluation:
    """
    Raises:
        ConfigError: the model has no hash function, or there is no such text.
    """
    folder = find_hash_function(arguments.model, arguments.hash_function)
    if folder is None:
        raise ConfigError("hash_function", "auto", f"a folder; {arguments.model} has no hash_function in it")
    function = load_hash_function(folder, arguments.model)
    ms_per_512 = time_prediction(function)
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    token_ids, mask = read_windows(arguments.text, arguments.model, arguments.window_tokens)
    token_ids, mask = _first_tokens(token_ids, mask, arguments.max_tokens)
    traces = LiveTraces(RoutingTracer(model, arguments.model), token_ids, mask)
    function.to(arguments.torch_device)
    traced = list(traces.batches(arguments.batch_size, None))
    exact, predicted = _perplexities(arguments, model, function, token_ids, mask)
    return Evaluation(
        model_fingerprint=function.spec.model_fingerprint,
        network=function.spec.network,
        top_k=function.spec.top_k,
        num_tokens=int(mask.sum()),
        recall=recall_per_layer(function, traced),
        recall_2k=recall_per_layer(function, traced, num_named(function, 2)),
        calibration=score_calibration(function, traced),
        perplexity_exact=exact,
        perplexity_predicted=predicted,
        ms_per_512_tokens=ms_per_512,
        torch_threads=torch.get_num_threads(),
        device=arguments.torch_device.type,
        dtype=str(arguments.torch_dtype).removeprefix("torch."),
    )


def num_named(function: HashFunction, times: int) -> int:
    """That many times the top k, or all experts."""
    return min(times * function.spec.top_k, function.spec.num_experts)


def _first_tokens(token_ids: Tensor, mask: Tensor, most: int) -> tuple[Tensor, Tensor]:
    mask = mask & (mask.flatten().cumsum(0).view_as(mask) <= most)
    some = mask.any(1)
    return token_ids[some], mask[some]


def _perplexities(
    arguments: EvaluateArguments,
    model: PreTrainedModel,
    function: HashFunction,
    token_ids: Tensor,
    mask: Tensor,
) -> tuple[float | None, float | None]:
    """With the model's own routing and with the predicted one; None where there is nothing to predict."""
    architecture = Checkpoint.open(arguments.model).architecture
    if architecture.is_encoder_decoder and arguments.targets:
        targets = read_windows(arguments.targets, arguments.model, arguments.window_tokens)
        if len(targets[0]) < len(token_ids):
            raise ConfigError("targets", arguments.targets, f"{len(token_ids)} windows, as in the text")
        tensors = [token_ids, mask, *(part[: len(token_ids)] for part in targets)]
        tensors.append(decoder_inputs(model, tensors[2]))
    elif architecture.num_encoder_layers:
        return None, None
    else:
        tensors = [token_ids, mask]
    windows = [
        Window(*parts) for parts in zip(*(each.split(arguments.batch_size) for each in tensors), strict=True)
    ]
    decoder = None
    if arguments.decoder_function:
        decoder = load_hash_function(arguments.decoder_function, arguments.model).to(arguments.torch_device)
    route = partial(predicted_routing, model, function, decoder=decoder)
    return perplexity(model, windows, lambda _: nullcontext()), perplexity(model, windows, route)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Sequence[Window], routing: Routing) -> float:
    """Of every token but the first of each window, given those before it in the window; of every target, if there are.

    Args:
        routing: a context for the forward over a window.
    """
    total, count = 0.0, 0
    for window in windows:
        window = window.to(model.device)
        with routing(window):
            logits, targets, mask = _forward(model, window)
        total += float(functional.cross_entropy(logits[mask].float(), targets[mask], reduction="sum"))
        count += int(mask.sum())
    return math.exp(total / count)


def _forward(model: PreTrainedModel, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [windows, tokens, vocab] of targets [windows, tokens], and which of them count."""
    if window.targets is None:
        logits = model(input_ids=window.token_ids, use_cache=False).logits
        return logits[:, :-1], window.token_ids[:, 1:], window.mask[:, 1:]
    assert window.target_mask is not None
    logits = model(
        input_ids=window.token_ids,
        attention_mask=window.mask.long(),
        decoder_input_ids=window.decoder_ids,
        use_cache=False,
    ).logits
    return logits, window.targets, window.target_mask


def predicted_routing(
    model: PreTrainedModel, function: HashFunction, window: Window, decoder: HashFunction | None = None
) -> AbstractContextManager[None]:
    """A forward within routes by prediction, ids and weights, as `routing=predicted` serves (SiDA, algorithm 1).

    Args:
        function: of the model's first layers: all of a decoder, or those of an encoder.
        decoder: of the layers after them; without it, their routers decide.
    """
    predicted = _by_layer(function, window.token_ids, window.mask)
    if decoder is not None:
        assert window.decoder_ids is not None and window.target_mask is not None
        predicted += _by_layer(decoder, window.decoder_ids, window.target_mask)

    def replace_routing(layer: int, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        if layer >= len(predicted):
            return ids, weights
        new_ids, new_weights = predicted[layer]
        # Through float16, as the hash table carries them.
        return new_ids.reshape(ids.shape), new_weights.half().to(weights.dtype).reshape(weights.shape)

    return intercepted_routing(model, replace_routing)


def _by_layer(function: HashFunction, token_ids: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, ids and weights [windows, tokens, top_k]."""
    ids, weights = function.route(function(token_ids, mask))  # [windows, tokens, layers, top_k]
    return list(zip(ids.unbind(2), weights.unbind(2), strict=True))


def time_prediction(function: HashFunction, num_prompts: int = 1) -> float:
    """Median milliseconds of predicting prompts of 512 tokens together, on the CPU, tables included."""
    predictor = HashFunctionPredictor(function)
    prompts = [
        [token % function.spec.vocab_size for token in range(TIMED_TOKENS)] for _ in range(num_prompts)
    ]
    predictor.predict(prompts)
    return sorted(_timed(lambda: predictor.predict(prompts)))[TIMED_RUNS // 2]


def _timed(call: Callable[[], object]) -> Iterator[float]:
    for _ in range(TIMED_RUNS):
        began = time.perf_counter()
        call()
        yield 1000 * (time.perf_counter() - began)


def print_report(evaluation: Evaluation) -> None:
    print(f"{evaluation.num_tokens} tokens, {evaluation.device}, {evaluation.dtype}")
    top_k, scores = evaluation.top_k, evaluation.calibration
    columns = {
        f"recall@{top_k}": evaluation.recall,
        f"recall@{2 * top_k}": evaluation.recall_2k,
        "error of weights": scores.weight_error,
        "uncalibrated": scores.weight_error_uncalibrated,
        "ECE of use": scores.use_ece,
        "uncalibrated ": scores.use_ece_uncalibrated,
    }
    print("layer  " + "  ".join(columns))
    for layer, row in enumerate(zip(*columns.values(), strict=True)):
        cells = (f"{value:{len(title)}.4f}" for title, value in zip(columns, row, strict=True))
        print(f"{layer:5d}  " + "  ".join(cells))
    print(f"mean   recall@{evaluation.top_k}  {evaluation.mean_recall:.4f}")
    if evaluation.perplexity_exact is not None:
        print(f"perplexity, the model's own routing  {evaluation.perplexity_exact:.3f}")
        print(f"perplexity, predicted routing        {evaluation.perplexity_predicted:.3f}")
    print(
        f"hash function on the CPU             {evaluation.ms_per_512_tokens:.1f} ms per {TIMED_TOKENS} tokens"
    )


def main() -> None:
    arguments = read_command_line(EvaluateArguments, __doc__)
    try:
        evaluation = evaluate(arguments)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error
    print_report(evaluation)
    text = json.dumps({**asdict(evaluation), "mean_recall": evaluation.mean_recall})
    if arguments.out:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
