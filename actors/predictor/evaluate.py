"""`python -m actors.predictor.evaluate model=FOLDER text=TEXT`: what a hash function is worth on text it has not seen.

Recall of the routers' choice per layer, perplexity with the model's own routing and with the predicted one
(teacher-forced, every expert resident), and the time it takes on this machine's CPU.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from actors.predictor.arguments import Arguments, read_command_line
from actors.predictor.hash_function import find_hash_function, load_hash_function
from actors.predictor.library_routing import intercepted_routing, load_resident_model
from actors.predictor.network import HashFunction
from actors.predictor.predictor import HashFunctionPredictor
from actors.predictor.text import read_tokens
from actors.predictor.traces import windows
from actors.predictor.tracing import LiveTraces, RoutingTracer
from actors.predictor.training import recall_per_layer
from common.errors import ConfigError, ServingError

TIMED_TOKENS = 512
TIMED_RUNS = 7


class EvaluateArguments(Arguments):
    text: str = Field(description="file, folder, or FILE.npz#NAME of token ids", min_length=1)
    hash_function: str = Field(
        "auto", description="folder; auto: the one in the model's folder", min_length=1
    )
    batch_size: int = Field(16, ge=1, description="windows per forward pass")
    max_tokens: int = Field(10**9, ge=2, description="of the text")
    out: str | None = Field(None, description="JSON file to write")


@dataclass(frozen=True)
class Evaluation:
    model_fingerprint: str
    top_k: int
    num_tokens: int
    recall: list[float]  # [layers], of the true top k
    perplexity_exact: float
    perplexity_predicted: float
    ms_per_512_tokens: float  # median on the CPU, one prompt
    torch_threads: int
    device: str
    dtype: str

    @property
    def mean_recall(self) -> float:
        return sum(self.recall) / len(self.recall)


def evaluate(arguments: EvaluateArguments) -> Evaluation:
    """
    Raises:
        ConfigError: the model has no hash function, or there is no such text.
        UnsupportedModelError: router decisions that cannot be recorded.
    """
    folder = find_hash_function(arguments.model, arguments.hash_function)
    if folder is None:
        raise ConfigError("hash_function", "auto", f"a folder; {arguments.model} has no hash_function in it")
    function = load_hash_function(folder, arguments.model)
    ms_per_512 = time_prediction(function)
    model = load_resident_model(arguments.model, arguments.torch_device, arguments.torch_dtype)
    tokens = read_tokens(arguments.text, arguments.model)[: arguments.max_tokens]
    token_ids, mask = windows(tokens, arguments.window_tokens)
    traces = LiveTraces(RoutingTracer(model, arguments.model), token_ids, mask)
    function.to(arguments.torch_device)
    batches = list(zip(token_ids.split(arguments.batch_size), mask.split(arguments.batch_size), strict=True))
    return Evaluation(
        model_fingerprint=function.spec.model_fingerprint,
        top_k=function.spec.top_k,
        num_tokens=len(tokens),
        recall=recall_per_layer(function, list(traces.batches(arguments.batch_size, None))),
        perplexity_exact=perplexity(model, batches, lambda _: nullcontext()),
        perplexity_predicted=perplexity(model, batches, lambda ids: predicted_routing(model, function, ids)),
        ms_per_512_tokens=ms_per_512,
        torch_threads=torch.get_num_threads(),
        device=arguments.torch_device.type,
        dtype=str(arguments.torch_dtype).removeprefix("torch."),
    )


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    batches: list[tuple[Tensor, Tensor]],
    routing: Callable[[Tensor], AbstractContextManager[None]],
) -> float:
    """Of every token but the first of each window, given those before it in the window.

    Args:
        batches: token ids [windows, tokens] int64 and their masks, on any device.
        routing: a context for the forward over these token ids.
    """
    total, count = 0.0, 0
    for token_ids, mask in batches:
        token_ids, targets = token_ids.to(model.device), mask[:, 1:].to(model.device)
        with routing(token_ids):
            logits = model(input_ids=token_ids, use_cache=False).logits[
                :, :-1
            ]  # [windows, tokens - 1, vocab]
        total += float(
            functional.cross_entropy(logits[targets].float(), token_ids[:, 1:][targets], reduction="sum")
        )
        count += int(targets.sum())
    return math.exp(total / count)


def predicted_routing(
    model: PreTrainedModel, function: HashFunction, token_ids: Tensor
) -> AbstractContextManager[None]:
    """A forward within routes by prediction, ids and weights, as `routing=predicted` serves (SiDA, algorithm 1)."""
    ids, weights = function.route(function(token_ids))  # [windows, tokens, layers, top_k]

    def replace_routing(layer: int, _ids: Tensor, true_weights: Tensor) -> tuple[Tensor, Tensor]:
        # Through float16, as the hash table carries them.
        return ids[:, :, layer].flatten(0, 1), weights[:, :, layer].flatten(0, 1).half().to(
            true_weights.dtype
        )

    return intercepted_routing(model, replace_routing)


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
    for layer, recall in enumerate(evaluation.recall):
        print(f"layer {layer:3d}  recall@{evaluation.top_k}  {recall:.4f}")
    print(f"mean      recall@{evaluation.top_k}  {evaluation.mean_recall:.4f}")
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
