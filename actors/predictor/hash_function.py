"""A trained hash function on the CPU: its folder, and its state along one sequence. Does not train or travel.

A folder holds `hash_function.json` (what it is made for) and `hash_function.safetensors` (its own weights in float16);
the token embeddings are read from the model's checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.predictor.network import HashFunction, HashFunctionSpec, WeightRule
from common.architecture import load_config, meta_model
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, ConfigError, VocabularyError
from common.hash_table import HashTable
from common.key_mapping import map_keys
from common.safetensors_index import index_tensors

SPEC_FILE = "hash_function.json"
WEIGHTS_FILE = "hash_function.safetensors"
PREDICTOR_NAME = "hash_function"

StepPrediction = tuple[
    NDArray[np.uint16], NDArray[np.float16]
]  # expert ids and weights, [layers, top_k] each


class HashFunctionState:
    """The hash function along one growing sequence. A step costs the same work whatever was read before it, but for one
    attention row of the paper's network. Not thread-safe.
    """

    def __init__(self, function: HashFunction) -> None:
        self.function = function
        self.network_state: Any = None  # of the function's network; None before the first token

    @torch.no_grad()
    def prefill(self, token_ids: Sequence[int]) -> HashTable:
        """Read tokens, the prompt or its next part, and predict their experts. A bidirectional function reads a whole
        sequence at once, and nothing after it.

        Raises:
            VocabularyError: an id lies outside the model's vocabulary.
        """
        inputs = checked(token_ids, self.function.spec).unsqueeze(0)  # [1, tokens]
        if self.function.spec.bidirectional:
            logits = self.function(inputs)
        else:
            logits, [self.network_state] = self.function.extend(inputs, [self.network_state])
        return to_table(self.function.spec, *self.function.route(logits[0]))

    def step(self, token_id: int) -> StepPrediction:
        """Read one token and predict its experts.

        Returns:
            Expert ids uint16 and weights float16, [layers, top_k] each, most likely first.
        Raises:
            VocabularyError: the id lies outside the model's vocabulary.
        """
        return step_together([self], [token_id])[0]


@torch.no_grad()
def step_together(states: Sequence[HashFunctionState], token_ids: Sequence[int]) -> list[StepPrediction]:
    """One token for each of several sequences that have been prefilled, or of new ones: one network call for all.

    Raises:
        VocabularyError: an id lies outside the model's vocabulary; no state has changed.
    """
    function = states[0].function
    inputs = checked(token_ids, function.spec).unsqueeze(1)  # [sequences, 1]
    logits, after = function.extend(inputs, [state.network_state for state in states])
    for state, network_state in zip(states, after, strict=True):
        state.network_state = network_state
    ids, weights = function.route(logits[:, 0])  # [sequences, layers, top_k]
    return list(zip(ids.numpy().astype(np.uint16), weights.numpy().astype(np.float16), strict=True))


def checked(token_ids: Sequence[int], spec: HashFunctionSpec) -> Tensor:
    """[tokens] int64.

    Raises:
        VocabularyError: an id lies outside the model's vocabulary.
    """
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    outside = (tokens < 0) | (tokens >= spec.vocab_size)
    if bool(outside.any()):
        raise VocabularyError(int(tokens[outside][0]), spec.vocab_size)
    return tokens


def to_table(spec: HashFunctionSpec, ids: Tensor, weights: Tensor) -> HashTable:
    """Args: ids and weights, [tokens, layers, top_k] each."""
    return HashTable(
        expert_ids=ids.transpose(0, 1).numpy().astype(np.uint16),
        weights=weights.transpose(0, 1).numpy().astype(np.float16),
        model_fingerprint=spec.model_fingerprint,
        predictor=PREDICTOR_NAME,
        predictor_version=spec.version,
    )


def save_hash_function(function: HashFunction, folder: str | Path) -> None:
    """Write the folder; weights are rounded to float16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().cpu().half().contiguous() for name, tensor in function.state_dict().items()
    }
    save_file(weights, folder / WEIGHTS_FILE)
    (folder / WEIGHTS_FILE).chmod(0o644)  # safetensors leaves it to its owner alone
    (folder / SPEC_FILE).write_text(json.dumps(asdict(function.spec), indent=2) + "\n", encoding="utf-8")


def load_hash_function(folder: str | Path, model_folder: str | Path) -> HashFunction:
    """The hash function of a model, in float32 on the CPU and ready for inference.

    Raises:
        CheckpointError: the folder is damaged, or the model's embeddings are not where it says.
        ConfigError: it was trained for another model.
    """
    folder = Path(folder)
    spec = read_spec(folder)
    _check_model(spec, folder, model_folder)
    function = HashFunction(spec, read_embedding(model_folder, spec.embedding_key))
    try:
        weights = load_file(folder / WEIGHTS_FILE)
        function.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(
            str(folder / WEIGHTS_FILE), f"no weights of this hash function ({error})"
        ) from error
    function.requires_grad_(False).eval().encode_vocabulary()
    return function


def find_hash_function(model_folder: str | Path, setting: str = "auto") -> Path | None:
    """The folder of the model's hash function; None when `setting` is "auto" and the model has none.

    Raises:
        ConfigError: the given folder is no hash function, or the one found is for another model.
        CheckpointError: the model or the hash function is damaged.
    """
    folder = Path(model_folder) / "hash_function" if setting == "auto" else Path(setting)
    if not (folder / SPEC_FILE).is_file():
        if setting == "auto":
            return None
        raise ConfigError(
            "hash_function", setting, f"a folder with a {SPEC_FILE}, or auto; there is none there"
        )
    _check_model(read_spec(folder), folder, model_folder)
    return folder


def read_spec(folder: Path) -> HashFunctionSpec:
    """
    Raises:
        CheckpointError: no readable description.
    """
    try:
        fields = json.loads((folder / SPEC_FILE).read_text(encoding="utf-8"))
        rule = WeightRule(**fields.pop("weight_rule"))
        if "half_lives" in fields:
            fields["half_lives"] = tuple(fields["half_lives"])
        return HashFunctionSpec(**fields, weight_rule=rule)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            str(folder / SPEC_FILE), f"not a hash function's description ({error})"
        ) from error


def _check_model(spec: HashFunctionSpec, folder: Path, model_folder: str | Path) -> None:
    fingerprint = Checkpoint.open(model_folder).fingerprint
    if spec.model_fingerprint != fingerprint:
        raise ConfigError(
            "hash_function",
            str(folder),
            f"it was trained for model {spec.model_fingerprint}, {model_folder} is {fingerprint}; "
            f"train one with `python -m actors.predictor.train model={model_folder} text=... out=...`",
        )


def find_embedding_key(model_folder: str | Path) -> str:
    """The key of the token embeddings in a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold them.
    """
    folder = Path(model_folder)
    model = meta_model(load_config(folder), folder)
    embedding = model.get_input_embeddings()
    target = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    keys = [mapped.key for mapped in map_keys(model, index_tensors(folder)) if mapped.target == target]
    if not keys:
        raise CheckpointError(str(folder), f"none of its tensors is {target}, which the hash function reads")
    return keys[0]


def read_embedding(model_folder: str | Path, key: str) -> Tensor:
    """[vocab, embedding] in the checkpoint's dtype.

    Raises:
        CheckpointError: the checkpoint does not hold it.
    """
    stored = index_tensors(Path(model_folder)).get(key)
    if stored is None:
        raise CheckpointError(str(model_folder), f"it has no tensor {key}, the hash function's input")
    with safe_open(stored.path, framework="pt") as shard:
        embedding: Tensor = shard.get_tensor(key)
    return embedding
