"""Expert loads, a file: how many tokens of each window of a recorded trace every expert of a model got.

`python -m actors.expert_store.record_loads` writes it, the store places experts by it, executors pin and prefetch by it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.checkpoint import Checkpoint
from common.errors import ConfigError

FORMAT_VERSION = "1"
SETTING = "placement_trace"


@dataclass(frozen=True, eq=False)
class ExpertLoads:
    """Loads of one model."""

    model_fingerprint: str
    counts: NDArray[np.int64]  # [windows, layers of the stack, experts], (token, chosen expert) pairs
    stack: str = "decoder"  # or "encoder": what was traced of a model that has both

    def save(self, path: str | Path) -> None:
        smallest = np.uint16 if self.counts.max() < 2**16 else np.uint32
        header = {
            "format": FORMAT_VERSION,
            "model_fingerprint": self.model_fingerprint,
            "stack": self.stack,
        }
        Path(path).write_bytes(save({"counts": self.counts.astype(smallest)}, header))

    @classmethod
    def load(cls, path: str | Path, setting: str = SETTING) -> "ExpertLoads":
        """
        Args:
            setting: that names the file, for the message.
        Raises:
            ConfigError: the file is not there or holds no loads of this format.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT_VERSION:
                    raise _unusable(
                        setting, path, f"its format is {header.get('format')}, not {FORMAT_VERSION}"
                    )
                counts = file.get_tensor("counts").astype(np.int64)
                return cls(header["model_fingerprint"], counts, header["stack"])
        except (OSError, SafetensorError, KeyError) as error:
            raise _unusable(setting, path, " ".join(str(error).split())) from error

    @classmethod
    def load_for(cls, checkpoint: Checkpoint, path: str | Path, setting: str = SETTING) -> NDArray[np.int64]:
        """[windows, layers, experts], of all layers of the model; 0 for those of a stack that was not traced.

        Args:
            setting: that names the file, for the message.
        Raises:
            ConfigError: the file is unusable, or its loads are of another model.
        """
        loads, architecture = cls.load(path, setting), checkpoint.architecture
        if loads.model_fingerprint != checkpoint.fingerprint:
            raise _unusable(
                setting,
                path,
                f"its loads are of model {loads.model_fingerprint}, {checkpoint.folder} is {checkpoint.fingerprint}",
            )
        encoder_layers = architecture.num_encoder_layers  # which come first
        decoder_layers = architecture.num_layers - encoder_layers
        missing = (0, decoder_layers) if loads.stack == "encoder" else (encoder_layers, 0)
        counts = np.pad(loads.counts, ((0, 0), missing, (0, 0)))
        if counts.shape[1:] != (architecture.num_layers, architecture.num_experts):
            raise _unusable(
                setting, path, f"its loads of the {loads.stack} have shape {list(loads.counts.shape)}"
            )
        return counts


def _unusable(setting: str, path: str | Path, problem: str) -> ConfigError:
    allowed = f"{problem}; give a file that `python -m actors.expert_store.record_loads` made from a trace of this model"
    return ConfigError(setting, str(path), allowed)
