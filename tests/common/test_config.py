import pickle
from pathlib import Path

import pytest
import torch

from common.config import REFERENCE_MODEL, ServingConfig
from common.config_table import markdown_table, replace_table
from common.errors import ConfigError
from common.slot_budget import SlotBudget

README = Path(__file__).parents[2] / "README.md"


def config(**args: object) -> ServingConfig:
    return ServingConfig.from_args(args, environ={})


def message(**args: object) -> str:
    with pytest.raises(ConfigError) as caught:
        config(**args)
    return str(caught.value)


def test_defaults_serve_the_reference_model() -> None:
    default = config()
    assert default.model == str(REFERENCE_MODEL)
    assert default.served_name == "reference"
    assert default.routing == "exact"


def test_reads_the_text_of_a_command_line() -> None:
    read = config(
        expert_slots="12GiB", prefetch="false", max_batch_size="4", target_ongoing_requests="2.5", seed="7"
    )
    assert read.expert_slots == SlotBudget("bytes", 12 * 2**30, "12GiB")
    assert (read.prefetch, read.max_batch_size, read.target_ongoing_requests, read.seed) == (False, 4, 2.5, 7)


def test_reads_the_typed_values_of_a_yaml_file() -> None:
    read = config(expert_slots=16, prefetch=False, max_batch_size=4, redis_url=None)
    assert read.expert_slots.amount == 16
    assert config(expert_slots="auto").expert_slots.is_auto
    assert read.redis_url is None


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("max_batch_size: 2\nmax_queued_requests: 2\ntable_ttl_s: 2\n")
    environ = {"SIDA_MAX_QUEUED_REQUESTS": "3", "SIDA_TABLE_TTL_S": "3", "OTHER": "x"}
    read = ServingConfig.from_args({"config": str(file), "table_ttl_s": "4"}, environ)
    assert (read.max_batch_size, read.max_queued_requests, read.table_ttl_s) == (2, 3, 4)


def test_an_empty_environment_variable_is_not_given() -> None:
    assert ServingConfig.from_args({}, {"SIDA_MODEL_NAME": ""}).model_name is None


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("model", "", "a folder"),
        ("model_name", "", "any text"),
        ("device", "tpu", "auto, cpu or cuda"),
        ("dtype", "int4", "auto, float32, bfloat16 or float16"),
        ("expert_slots", "lots", "a number of experts per layer (16), a share of the experts (25%)"),
        ("expert_slots", "101%", "a share of the experts (25%)"),
        ("expert_slots", 0, "a number of experts per layer (16)"),
        ("routing", "random", "exact or predicted"),
        ("prefetch", "maybe", "true or false"),
        ("eviction", "mru", "lfu, lru or fifo; on cpu also inactive-lifo or activation"),
        ("decode_predictor", "oracle", "auto, none or next-gate; on cpu also activation-trace or frequency"),
        ("resident_set", "", "a file"),
        ("pinned_experts", "-1", "auto or 0 to 4096"),
        ("hash_function", "", "auto or a folder"),
        ("table_ttl_s", "0", "1 to 86400"),
        ("max_batch_size", "1.5", "1 to 1024"),
        ("max_batch_size", "0", "1 to 1024"),
        ("max_context_tokens", "1", "auto or 2 to 10000000"),
        ("prefill_chunk_tokens", "0", "1 to 65536"),
        ("min_executors", "-1", "0 to 1024"),
        ("max_executors", "0", "1 to 1024"),
        ("target_ongoing_requests", "inf", "above 0"),
        ("target_ongoing_requests", "0", "above 0"),
        ("max_queued_requests", "0", "1 to 1000000"),
        ("seed", "-1", "0 to 9223372036854775807"),
    ],
)
def test_an_impossible_value_names_key_value_and_what_is_allowed(
    key: str, value: object, allowed: str
) -> None:
    text = message(**{key: value})
    assert text.startswith(f"{key}={value!r} is not possible: ")
    assert allowed in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("api_key", "two words", "printable ASCII without spaces"),
        ("redis_url", "http://user:secret@host", "redis://, rediss:// or unix:// and an address"),
    ],
)
def test_an_error_never_shows_a_secret(key: str, value: str, allowed: str) -> None:
    assert message(**{key: value}) == f"{key}='***' is not possible: {allowed}"


def test_secrets_stay_out_of_the_repr() -> None:
    assert "hunter" not in repr(config(api_key="hunter2", redis_url="redis://:hunter2@host"))


def test_an_unknown_key_is_an_error_with_the_nearest_known_one() -> None:
    assert (
        message(expert_slot="4")
        == "expert_slot='4' is not possible: there is no such key; did you mean expert_slots?"
    )
    assert (
        message(api_kye="hunter2")
        == "api_kye='***' is not possible: there is no such key; did you mean api_key?"
    )
    assert "the keys are model, model_name" in message(zzz="1")


def test_an_unknown_environment_variable_is_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean routing"):
        ServingConfig.from_args({}, {"SIDA_ROUTNG": "exact"})


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    assert "a readable YAML file" in message(config=str(tmp_path / "missing.yaml"))
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    assert "a YAML file of key: value lines" in message(config=str(file))
    file.write_text("a: [")
    assert "\n" not in message(config=str(file))


def test_fewer_executors_at_most_than_at_least_is_an_error() -> None:
    assert message(min_executors="3") == (
        "min_executors=3 is not possible: max_executors is 1; give at most that, or raise max_executors"
    )


def test_relative_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert config(model="mine").model == str(tmp_path / "mine")
    assert config(model="mine").served_name == "mine"
    assert config(hash_function="trained").hash_function == str(tmp_path / "trained")


def test_the_context_is_limited_by_the_model() -> None:
    assert config().context_limit(262_144) == 4096
    assert config(max_context_tokens="auto").context_limit(2048) == 2048
    assert config(max_context_tokens="8192").context_limit(262_144) == 8192
    with pytest.raises(ConfigError, match="max_context_tokens=8192 .* the model's limit is 2048 tokens"):
        config(max_context_tokens="8192").context_limit(2048)


def test_auto_dtype_is_the_checkpoints_on_cuda_only() -> None:
    assert config().compute_dtype("cuda", torch.bfloat16) == torch.bfloat16
    assert config().compute_dtype("cpu", torch.bfloat16) == torch.float32
    assert config(dtype="float16").compute_dtype("cpu", torch.bfloat16) == torch.float16


def test_survives_pickle() -> None:
    original = config(expert_slots="25%", api_key="hunter2")
    assert pickle.loads(pickle.dumps(original)) == original


def test_the_readmes_table_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == replace_table(text), "run: python -m common.config_table --write README.md"


def test_a_text_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="has no"):
        replace_table(markdown_table())
