"""What a model's routers decide on held-out text, token by token, in one file: the input of cache simulations.

Traces an all-resident model teacher-forced, so that the routing is what decoding the same text would do.

    python -m benchmarks.gpu.routing_trace [--model models/reference] [--tokens 4096] --out trace.npz
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from actors.predictor.library_routing import load_resident_model, recorded_router_logits
from actors.predictor.text import read_tokens

REFERENCE_MODEL = Path(__file__).parents[2] / "models" / "reference"


@dataclass(frozen=True)
class RoutingTrace:
    """Routing of consecutive tokens in every MoE layer."""

    ids: npt.NDArray[np.uint8 | np.uint16]  # [layers, tokens, top_k], most likely first
    num_experts: int
    # [layers, the first of the tokens, experts] float16: softmax of all router logits
    probabilities: npt.NDArray[np.float16] | None = None

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        with np.load(path) as parts:
            return cls(parts["ids"], int(parts["num_experts"]), parts.get("probabilities"))

    def save(self, path: Path) -> None:
        parts = {"ids": self.ids, "num_experts": np.array(self.num_experts)}
        if self.probabilities is not None:
            parts["probabilities"] = self.probabilities
        np.savez_compressed(path, **parts)  # type: ignore[arg-type]  # the stub takes the names for options

    def used(self) -> npt.NDArray[np.bool_]:
        """[tokens, layers, experts]: whether the token uses the expert."""
        layers, tokens, _ = self.ids.shape
        used = np.zeros((tokens, layers, self.num_experts), np.bool_)
        np.put_along_axis(used, self.ids.transpose(1, 0, 2).astype(np.int64), True, axis=-1)
        return used

    def usage_entropy(self) -> npt.NDArray[np.float64]:
        """[layers]: entropy of the experts' shares of all uses; 1.0 when they are even."""
        shares = self.used().mean(0) / self.ids.shape[-1]  # [layers, experts]
        logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
        entropy: npt.NDArray[np.float64] = -(shares * logs).sum(-1) / np.log(self.num_experts)
        return entropy

    def step_overlap(self) -> npt.NDArray[np.float64]:
        """[layers]: share of a token's experts that the token before it used too; top_k / experts by chance."""
        used = self.used()
        overlap: npt.NDArray[np.float64] = (used[1:] & used[:-1]).sum(-1).mean(0) / self.ids.shape[-1]
        return overlap


@torch.no_grad()
def trace_routing(
    model: PreTrainedModel, token_ids: Tensor, context: int, num_probabilities: int = 4096
) -> RoutingTrace:
    """Route text through the model in windows of `context` tokens laid end to end.

    Args:
        token_ids: [tokens] int64; what the last window lacks is left out.
        num_probabilities: store the router probabilities of that many first tokens.
    """
    config = model.config.get_text_config()
    top_k = config.num_experts_per_tok
    ids, probabilities, num_stored = [], [], 0
    for window in token_ids[: len(token_ids) // context * context].view(-1, 1, context):
        with recorded_router_logits(model) as recorded:
            model.base_model(input_ids=window.to(model.device), use_cache=False)
        logits = torch.stack(recorded).float()  # [layers, context, experts]
        ids.append(logits.topk(top_k, -1).indices.cpu())
        if num_stored < num_probabilities:
            probabilities.append(logits.softmax(-1)[:, : num_probabilities - num_stored].half().cpu())
            num_stored += probabilities[-1].shape[1]
    num_experts = logits.shape[-1]
    narrow = np.uint8 if num_experts <= 256 else np.uint16
    return RoutingTrace(
        torch.cat(ids, 1).numpy().astype(narrow),
        num_experts,
        torch.cat(probabilities, 1).numpy() if probabilities else None,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REFERENCE_MODEL)
    parser.add_argument(
        "--text", default=str(REFERENCE_MODEL / "heldout.txt"), help="or FILE.npz#NAME of ids"
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--probabilities", type=int, default=4096, help="tokens whose probabilities to store")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    model = load_resident_model(arguments.model, torch.device(arguments.device), dtype)
    token_ids = read_tokens(arguments.text, arguments.model)[: arguments.tokens]
    trace = trace_routing(model, token_ids, arguments.context, arguments.probabilities)
    trace.save(arguments.out)
    print(f"{trace.ids.shape[1]} tokens traced, {arguments.out.stat().st_size / 2**20:.1f} MiB")
    print("usage entropy", trace.usage_entropy().round(3), "step overlap", trace.step_overlap().round(3))


if __name__ == "__main__":
    main()
