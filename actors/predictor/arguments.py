"""`key=value` arguments of this package's commands, as `serve run` takes them: typed, with a help text, unknown keys
refused.
"""

import sys
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.errors import ConfigError, ServingError

Options = TypeVar("Options", bound=BaseModel)


class Arguments(BaseModel):
    """What all commands share."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(description="checkpoint folder", min_length=1)
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="the model's; auto: bfloat16 on cuda, float32 on cpu"
    )
    window_tokens: int = Field(512, ge=2, description="the text is cut into windows of this length")

    @property
    def torch_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device.type == "cuda" else torch.float32
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


def read_arguments(options: type[Options], words: Sequence[str]) -> Options:
    """
    Raises:
        ConfigError: a word that is no key=value, an unknown key, or an impossible value.
    """
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            raise ConfigError(
                "argument", word, f"write key=value; the keys are {', '.join(options.model_fields)}"
            )
        values[key] = value
    try:
        return options.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(key, problem["input"] if key in values else None, problem["msg"]) from error


def read_command_line(options: type[Options], purpose: str | None) -> Options:
    """The arguments of this process; prints the help or a one-line error and ends the process where it must."""
    words = sys.argv[1:]
    if not words or {"-h", "--help", "help"} & set(words):
        print(help_text(options, purpose))
        raise SystemExit(0 if words else 2)
    try:
        return read_arguments(options, words)
    except ServingError as error:
        raise SystemExit(f"error: {error}") from error


def help_text(options: type[BaseModel], purpose: str | None) -> str:
    lines = [purpose or "", "", "Arguments, as key=value:"]
    for name, field in options.model_fields.items():
        default = "required" if field.is_required() else field.default
        lines.append(f"  {name:<16} {field.description} ({default})")
    return "\n".join(lines)
