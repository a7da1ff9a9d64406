"""The bodies of `POST /classify`, in the form that vLLM gives this route."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema, model_validator

from deployments.openai_schema import PROMPTS_SCHEMA, Prompt, Usage, as_prompts, describe_nulls


class ClassificationRequest(BaseModel):
    """`POST /classify`: one text or several, each as text or as token ids. A field that is null counts as not given."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, json_schema_extra=describe_nulls)

    input: Annotated[list[Prompt], BeforeValidator(as_prompts), WithJsonSchema(PROMPTS_SCHEMA)]
    model: str | None = None
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}


class Classified(BaseModel):
    """One text's labels: softmax over them, or a sigmoid where there is one alone."""

    index: int
    label: str  # the likeliest
    probs: list[float]  # of all labels, in the order of the model's config
    num_classes: int


class Classification(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int  # Unix seconds
    model: str
    data: list[Classified]
    usage: Usage
