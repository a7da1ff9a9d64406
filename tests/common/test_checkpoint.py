"""Checkpoint: every expert's bytes, found without loading the model, equal the library's own fully loaded model."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.architecture import load_config, model_class
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, UnsupportedModelError
from tests.tiny_models import (
    ENCODER_DECODER_FAMILIES,
    FAMILIES,
    NUM_EXPERTS,
    UNSUPPORTED_FAMILIES,
    make_checkpoint,
    make_model,
)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FUSED_ON_DISK = {"gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid", "granitemoe_swa"}


def read_experts(checkpoint: Checkpoint) -> dict[tuple[int, int], dict[str, Tensor]]:
    experts = {}
    for layer, expert_id in checkpoint.expert_ranges:
        slab = np.full(checkpoint.stored_layout.slab_bytes, 0xFF, np.uint8)  # NaN wherever nothing is read
        checkpoint.read_expert(layer, expert_id, slab)
        experts[layer, expert_id] = checkpoint.stored_layout.views(torch.from_numpy(slab))
    return experts


def assert_equals_model(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    experts = read_experts(checkpoint)
    modules = checkpoint.architecture.experts_modules
    assert len(experts) == len(modules) * NUM_EXPERTS
    for (layer, expert_id), views in experts.items():
        module = model.get_submodule(modules[layer])
        for name, view in views.items():
            assert torch.equal(view, module.get_parameter(name)[expert_id]), (modules[layer], expert_id, name)


@pytest.mark.parametrize("family", FAMILIES + ENCODER_DECODER_FAMILIES + UNSUPPORTED_FAMILIES)
def test_experts_equal_the_fully_loaded_model(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(family, tmp_path))
    model = model_class(load_config(tmp_path)).from_pretrained(tmp_path)
    assert_equals_model(checkpoint, model)
    assert checkpoint.architecture.num_experts == NUM_EXPERTS


@pytest.mark.parametrize("family", FAMILIES + ENCODER_DECODER_FAMILIES)
def test_experts_and_dense_tensors_are_all_of_the_model(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(family, tmp_path))
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    headers = sum(
        8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tmp_path.glob("*.safetensors")
    )
    assert checkpoint.dense_bytes + sum(
        r.num_bytes for rs in checkpoint.expert_ranges.values() for r in rs
    ) == (stored - headers)


def test_names_a_missing_part_of_all_experts(tmp_path: Path) -> None:
    make_checkpoint("dbrx", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("transformer.blocks.1.ffn.experts.mlp.v1"))
    with pytest.raises(CheckpointError, match="one part of transformer.blocks.1.ffn.experts.gate_up_proj"):
        Checkpoint.open(tmp_path)


def test_names_a_missing_expert_that_is_no_bare_number(tmp_path: Path) -> None:
    key = "encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight"
    make_checkpoint("switch_transformers", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=f"1 expert tensors are missing, the first is {key}"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_layout_has_the_dtype_of_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path, dtype=dtype))
    assert checkpoint.stored_layout.dtype == dtype
    assert_equals_model(checkpoint, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_tensors_of_one_expert_may_lie_in_many_shards(family: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(make_checkpoint(family, tmp_path, max_shard_size="50KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_equals_model(checkpoint, make_model(family))


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_shard_size="200KB")
    (tmp_path / INDEX).unlink()
    assert_equals_model(Checkpoint.open(tmp_path), make_model("qwen3_moe"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v2"])
def test_fused_checkpoints_hold_one_slice_per_expert(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    model = make_model(family)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / SINGLE)
    assert_equals_model(Checkpoint.open(tmp_path), model)


def test_alignment_gaps_are_left_alone(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(
        make_checkpoint("gpt_oss", tmp_path, intermediate_size=40, dtype=torch.bfloat16)
    )
    layout = checkpoint.stored_layout
    in_gap = np.ones(layout.slab_bytes, bool)
    for tensor in layout.tensors:
        in_gap[tensor.offset_bytes : tensor.offset_bytes + tensor.num_elements * 2] = False
    first, second = np.full(layout.slab_bytes, 7, np.uint8), np.full(layout.slab_bytes, 8, np.uint8)
    checkpoint.read_expert(0, 0, first)
    checkpoint.read_expert(0, 0, second)
    assert in_gap.any()
    assert np.array_equal(first != second, in_gap)


def test_fingerprint_is_the_same_for_the_same_weights(tmp_path: Path) -> None:
    first = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path / "a"))
    again = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path / "b"))
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 16


def test_fingerprint_tells_weights_of_equal_shape_apart(tmp_path: Path) -> None:
    first = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path / "a", seed=0))
    other = Checkpoint.open(make_checkpoint("qwen3_moe", tmp_path / "b", seed=1))
    assert first.fingerprint != other.fingerprint


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


GATE = "model.layers.1.mlp.experts.5.gate_proj.weight"
DOWN = "model.layers.2.mlp.experts.0.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint("qwen3_moe", tmp_path)


def test_names_and_counts_missing_expert_tensors(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: [tensors.pop(GATE), tensors.pop(DOWN)])
    with pytest.raises(CheckpointError, match=f"2 expert tensors are missing, the first is {GATE}"):
        Checkpoint.open(folder)


def test_names_a_layer_without_experts(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "layers.1.mlp.experts" in key])
    with pytest.raises(
        CheckpointError, match="2 expert tensors are missing.*model.layers.1.mlp.experts.gate_up_proj"
    ):
        Checkpoint.open(folder)


def test_names_a_layer_without_one_kind_of_projection(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(key) for key in list(t) if "layers.1" in key and "up_proj" in key])
    with pytest.raises(
        CheckpointError, match="missing, the first is one part of model.layers.1.mlp.experts.gate_up_proj"
    ):
        Checkpoint.open(folder)


def test_refuses_more_experts_than_the_config_says(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({DOWN.replace("experts.0", "experts.8"): t[DOWN].clone()}))
    with pytest.raises(CheckpointError, match="experts.8.down_proj.weight is more than the 8 experts"):
        Checkpoint.open(folder)


def test_refuses_an_expert_of_the_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({GATE: torch.zeros(16, 64)}))
    with pytest.raises(
        CheckpointError, match=rf"{GATE} has shape \[16, 64\], config.json makes it \[32, 64\]"
    ):
        Checkpoint.open(folder)


def test_refuses_a_fused_tensor_of_the_wrong_shape(tmp_path: Path) -> None:
    make_checkpoint("granitemoe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 4}))
    with pytest.raises(
        CheckpointError, match=r"input_linear.weight has shape \[8, 96, 64\], config.json makes it \[4, "
    ):
        Checkpoint.open(tmp_path)


def test_refuses_mixed_dtypes(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({GATE: tensors[GATE].bfloat16()}))
    with pytest.raises(UnsupportedModelError, match="mixed dtypes: BF16, F32"):
        Checkpoint.open(folder)


def test_refuses_integer_experts(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({key: t[key].to(torch.int8) for key in t if ".experts." in key}))
    with pytest.raises(UnsupportedModelError, match="its expert tensors are I8, not one of F32, BF16, F16"):
        Checkpoint.open(folder)


def test_refuses_quantised_checkpoints(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UnsupportedModelError, match="quantised"):
        Checkpoint.open(folder)


def test_refuses_conversions_that_move_elements(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    converter = WeightConverter(
        r"experts\.(\d+)\.down_proj\.weight", "experts.down_proj", operations=[Transpose(1, 2)]
    )
    monkeypatch.setattr("common.key_mapping.get_model_conversion_mapping", lambda model: [converter])
    with pytest.raises(UnsupportedModelError, match="down_proj is made by Transpose"):
        Checkpoint.open(make_fused_gate_up(folder))


def make_fused_gate_up(folder: Path) -> Path:
    fused = {
        k: v.contiguous() for k, v in make_model("qwen3_moe").state_dict().items() if "down_proj" not in k
    }
    single = {k: v for k, v in load_file(folder / SINGLE).items() if "down_proj" in k}
    save_file({**fused, **single}, folder / SINGLE)
    return folder


def test_refuses_a_truncated_shard(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:-1])
    with pytest.raises(
        CheckpointError, match=f"truncated: its header needs {len(data)} bytes, the file has {len(data) - 1}"
    ):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 32, (10).to_bytes(8, "little") + b"not json!!"]
)
def test_refuses_files_that_are_no_safetensors(content: bytes, folder: Path) -> None:
    (folder / SINGLE).write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file|unreadable header"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"dtype": "F32"},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": 1, "shape": 3},
        [],
    ],
)
def test_refuses_header_entries_that_make_no_sense(entry: object, folder: Path) -> None:
    header = json.dumps({"some.key": entry}).encode()
    (folder / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(CheckpointError, match="some.key"):
        Checkpoint.open(folder)


def test_names_missing_shards(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"1 of {len(shards)} shards are missing: {shards[1].name}"):
        Checkpoint.open(tmp_path)


def test_names_tensors_that_only_the_index_knows(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(
        CheckpointError, match="1 tensors of model.safetensors.index.json are in no shard.*model.ghost"
    ):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_refuses_a_damaged_index(content: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_shard_size="200KB")
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        Checkpoint.open(tmp_path)


def test_refuses_a_tensor_stored_twice(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path, max_shard_size="200KB")
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / "copy.safetensors").write_bytes(first.read_bytes())
    index["weight_map"]["another"] = "copy.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"is both in copy.safetensors and in {first.name}"):
        Checkpoint.open(tmp_path)


def test_refuses_a_folder_without_shards(folder: Path) -> None:
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="has no \\*.safetensors files"):
        Checkpoint.open(folder)


def test_refuses_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no config.json there"):
        Checkpoint.open(tmp_path)


def test_reading_after_the_shard_shrank_says_so(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:4096])
    out = np.empty(checkpoint.stored_layout.slab_bytes, np.uint8)
    with pytest.raises(CheckpointError, match="ends before byte"):
        checkpoint.read_expert(2, 7, out)


def test_reading_after_the_shard_is_gone_says_so(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot be opened on node .*No such file"):
        checkpoint.read_expert(0, 0, np.empty(checkpoint.stored_layout.slab_bytes, np.uint8))
