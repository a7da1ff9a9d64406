"""What cannot work ends in one line, before Ray starts and before any weight is read."""

import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import ray
import torch

from actors.expert_store.loads import ExpertLoads
from common.architecture import load_config
from common.config import ServingConfig
from deployments.__main__ import main
from deployments.app import build, checked_config, served_model
from deployments.ingress import ServedModel
from tests.tiny_models import VOCAB_SIZE, make_checkpoint, make_model

SERVE = Path(sys.executable).with_name("serve")


def write_config(family: str, folder: Path) -> Path:
    """A checkpoint folder with a config and nothing else: all that may be read here."""
    make_model(family).config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config("qwen3_moe", tmp_path_factory.mktemp("tiny"))


def message(**args: object) -> str:
    was_running = ray.is_initialized()  # by a test before this one
    with pytest.raises(click.ClickException) as caught:
        build({key: str(value) for key, value in args.items()})
    assert ray.is_initialized() == was_running
    assert "\n" not in caught.value.message
    return caught.value.message


def test_decides_the_device(folder: Path) -> None:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    assert checked_config({"model": str(folder)})[0].device == here
    assert checked_config({"model": str(folder), "device": "cuda"})[0].device == "cuda"


def test_keeps_what_was_asked_for(folder: Path) -> None:
    args = {"model": str(folder), "device": "cpu", "expert_slots": "100%", "max_context_tokens": 64}
    config, _ = checked_config(args)
    assert config == ServingConfig.from_args(args, {})


def test_decides_the_context_by_the_models_limit(folder: Path) -> None:
    config, architecture = checked_config({"model": str(folder)})
    assert config.max_context_tokens == architecture.max_context_tokens == 512


def test_tells_the_ingress_what_the_model_does(folder: Path, tmp_path: Path) -> None:
    def served(folder: Path) -> ServedModel:
        return served_model(checked_config({"model": str(folder)})[1])

    assert served(folder) == ServedModel(VOCAB_SIZE)
    text_to_text = write_config("switch_transformers", tmp_path)
    assert served(text_to_text) == ServedModel(VOCAB_SIZE, has_encoder=True)
    config = load_config(text_to_text)
    config.architectures = ["SwitchTransformersForSequenceClassification"]
    config.id2label = {0: "ham", 1: "spam"}
    config.save_pretrained(tmp_path)
    assert served(tmp_path) == ServedModel(VOCAB_SIZE, has_encoder=True, labels=("ham", "spam"))


def test_names_an_unknown_key() -> None:
    assert message(expert_slot=4).endswith("did you mean expert_slots?")


def test_names_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert message(model=tmp_path / "nothing").startswith(
        f"checkpoint {tmp_path}/nothing: no config.json there"
    )


def test_names_an_unsupported_family(tmp_path: Path) -> None:
    text = message(model=write_config("qwen3_next", tmp_path))
    assert "qwen3_next is not supported yet: it has linear_attention layers" in text


def test_names_too_few_and_too_many_slots(folder: Path) -> None:
    assert "one token needs" in message(model=folder, expert_slots=1)
    assert "experts per layer; give" in message(model=folder, expert_slots=1000)
    assert "one token needs" in message(model=folder, expert_slots="1kB")


def test_leaves_it_to_the_executors_what_fits(folder: Path) -> None:
    args = {"model": str(folder), "device": "cuda", "expert_slots": "auto"}
    assert checked_config(args)[0].expert_slots.is_auto


def test_names_a_context_above_the_models(folder: Path) -> None:
    assert message(model=folder, max_context_tokens=10_000_000).startswith("max_context_tokens=10000000")


def test_predicted_routing_needs_a_hash_function(folder: Path, tmp_path: Path) -> None:
    assert "has no hash_function folder" in message(model=folder, routing="predicted")
    assert message(model=folder, hash_function=tmp_path).startswith(f"hash_function={str(tmp_path)!r}")


def test_names_a_placement_trace_of_another_model(tmp_path: Path) -> None:
    checkpoint, loads = make_checkpoint("qwen3_moe", tmp_path / "model"), tmp_path / "loads"
    ExpertLoads("0123456789abcdef", np.ones((1, 3, 8), np.int64)).save(loads)
    text = message(model=checkpoint, placement_trace=loads)
    assert text.startswith(f"placement_trace={str(loads)!r} is not possible: its loads are of model 0123")
    assert "No such file" in message(model=checkpoint, placement_trace=tmp_path / "nothing")


def test_names_what_a_gpu_cannot_do(folder: Path) -> None:
    on_gpu = {"model": folder, "device": "cuda"}
    assert message(**on_gpu, eviction="activation").startswith(
        "eviction='activation' is not possible: on a GPU"
    )
    told = message(**on_gpu, decode_predictor="activation-trace")
    assert told.startswith("decode_predictor='activation-trace' is not possible: on a GPU")
    assert "auto, none, next-gate" in told
    assert (
        checked_config({**on_gpu, "model": str(folder), "decode_predictor": "next-gate"})[0].device == "cuda"
    )


def test_names_a_predictor_that_the_model_or_a_setting_rules_out(folder: Path, tmp_path: Path) -> None:
    biased = write_config("minimax_m2", tmp_path)
    on_cpu = {"model": folder, "device": "cpu"}
    assert "hidden states alone" in message(model=biased, device="cpu", decode_predictor="next-gate")
    assert "set resident_set" in message(**on_cpu, decode_predictor="frequency")
    assert message(**on_cpu, expert_slots=4, pinned_experts=1).startswith("pinned_experts=1")
    settings = {"model": str(folder), "device": "cpu", "decode_predictor": "next-gate"}
    assert checked_config(settings)[0].decode_predictor == "next-gate"


def test_names_a_resident_set_of_another_model(tmp_path: Path) -> None:
    checkpoint, loads = make_checkpoint("qwen3_moe", tmp_path / "model"), tmp_path / "loads"
    ExpertLoads("0123456789abcdef", np.ones((1, 3, 8), np.int64)).save(loads)
    text = message(model=checkpoint, resident_set=loads)
    assert text.startswith(f"resident_set={str(loads)!r} is not possible: its loads are of model 0123")


EXPECTED = "Error: expert_slot='4' is not possible: there is no such key; did you mean expert_slots?"


def test_the_command_line_ends_with_that_line() -> None:
    command = [str(SERVE), "run", "--name", "sida", "deployments.app:build", "expert_slot=4"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1] == EXPECTED
    assert "Traceback" not in ended.stderr


def test_our_command_ends_with_that_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["deployments", "expert_slot=4"])
    was_running = ray.is_initialized()
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == EXPECTED, "which Python prints, and nothing else, with status 1"
    assert ray.is_initialized() == was_running
