from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeTopKRouter

from actors.executor.gpu import dense_kernels
from actors.executor.gpu.dense_kernels import linear, rms_norm, route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Of the largest value. The interpreter truncates to bfloat16, where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.dtype == expected.dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [64, 200])
def test_rms_norm_equals_the_library(device: str, dtype: torch.dtype, hidden: int) -> None:
    x = random(3, hidden, dtype=dtype, device=device)
    module = Qwen3MoeRMSNorm(hidden, eps=1e-3).to(device, dtype)
    module.weight.data = random(hidden, dtype=dtype, device=device, seed=1)
    normed, total = rms_norm(x, module.weight, 1e-3)
    assert total is x
    assert_near(normed, module(x), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_normalises_the_rounded_sum(device: str, dtype: torch.dtype) -> None:
    x, delta = (random(2, 96, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    module = Qwen3MoeRMSNorm(96).to(device, dtype)
    normed, total = rms_norm(x, module.weight, 1e-6, delta)
    if device == "cuda" or dtype != torch.bfloat16:
        assert torch.equal(total, x + delta)
    assert_near(total, x + delta, TOLERANCE[dtype])
    assert_near(normed, module(total), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "num_outputs", "num_inputs"),
    [(1, 48, 64), (5, 33, 100), (9, 16, 1024), (20, 40, 1100)],
    ids=["tiny", "odd", "even", "two steps and odd"],
)
def test_linear_equals_the_library(
    device: str, dtype: torch.dtype, rows: int, num_outputs: int, num_inputs: int
) -> None:
    x = random(rows, num_inputs, dtype=dtype, device=device)
    weight = random(num_outputs, num_inputs, dtype=dtype, device=device, seed=1)
    bias = 10 * random(num_outputs, dtype=dtype, device=device, seed=2)
    for added in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if added is None else added.double())
        assert_near(linear(x, weight, added), exact.to(dtype), TOLERANCE[dtype])


def test_linear_of_a_large_layer_equals_the_library(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_kernels, "_WIDE_FROM", 16)
    x = random(3, 70, dtype=torch.float32, device=device)
    weight = random(70, 70, dtype=torch.float32, device=device, seed=1)
    assert_near(linear(x, weight), F.linear(x.double(), weight.double()).float(), 2e-6)


def test_linear_rounds_before_it_widens(device: str) -> None:
    x, weight = (random(4, 64, dtype=torch.bfloat16, device=device, seed=seed) for seed in (0, 1))
    widened = linear(x, weight, out_dtype=torch.float32)
    assert widened.dtype == torch.float32
    assert torch.equal(widened, linear(x, weight).float())


def test_linear_reads_nothing_beyond_its_rows(device: str) -> None:
    x = torch.full((8, 64), float("nan"), device=device)
    x[:3] = 1.0
    output = linear(x[:3], torch.ones(16, 64, device=device))
    assert torch.equal(output, torch.full((3, 16), 64.0, device=device))
    assert linear(x, torch.ones(16, 64, device=device))[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True])
def test_a_row_of_linear_does_not_depend_on_the_batch(
    device: str, dtype: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wide:
        monkeypatch.setattr(dense_kernels, "_WIDE_FROM", 0)
    x = random(20, 1300, dtype=dtype, device=device)
    weight = random(40, 1300, dtype=dtype, device=device, seed=1)
    if (
        device == "cpu"
    ):  # numpy sums in another order for every shape: whole numbers give one sum in any order
        x, weight = x.round(), weight.round()
    alone = linear(x[3:4], weight)
    for rows in (5, 12, 20):
        assert torch.equal(linear(x[:rows], weight)[3:4], alone), f"differs in a batch of {rows}"
    assert not torch.equal(linear(x[:5], weight)[2:3], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_norm_and_router_does_not_depend_on_the_batch(device: str, dtype: torch.dtype) -> None:
    x, delta = (random(20, 60, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    weight = torch.ones(60, dtype=dtype, device=device)

    def results(rows: slice) -> list[Tensor]:
        return [*rms_norm(x[rows], weight, 1e-6, delta[rows]), *route(x[rows], x.shape[1], 4, True, dtype)]

    for alone, together, many in zip(
        results(slice(3, 4)), results(slice(0, 5)), results(slice(0, 20)), strict=True
    ):
        assert torch.equal(together[3:4], alone)
        assert torch.equal(many[3:4], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (60, 6), (512, 10)])
def test_route_equals_the_library(
    device: str, dtype: torch.dtype, renormalize: bool, num_experts: int, top_k: int
) -> None:
    config = SimpleNamespace(
        num_experts_per_tok=top_k, num_experts=num_experts, norm_topk_prob=renormalize, hidden_size=16
    )
    module = Qwen3MoeTopKRouter(config).to(device, dtype)
    module.weight.data = random(num_experts, 16, dtype=dtype, device=device, seed=1)
    logits, expected_weights, _ = module(random(3, 16, dtype=dtype, device=device))
    ids, weights = route(logits, logits.shape[1], top_k, renormalize, dtype)
    # The library leaves the order of equally likely experts open.
    expected_ids = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert ids.dtype == torch.int32
    assert torch.equal(ids.long(), expected_ids)
    assert_near(weights, expected_weights, TOLERANCE[dtype])


def test_route_keeps_fp32_weights_of_bfloat16_logits(device: str) -> None:
    module = MixtralTopKRouter(SimpleNamespace(num_experts_per_tok=2, num_local_experts=8, hidden_size=16))
    module.weight.data = random(8, 16, dtype=torch.bfloat16, device="cpu", seed=1)
    logits, expected, _ = module.to(device)(random(3, 16, dtype=torch.bfloat16, device=device))
    assert_near(route(logits, logits.shape[1], 2, True, torch.float32)[1], expected, 2e-6)


def test_route_prefers_the_lowest_of_equal_experts(device: str) -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]], device=device)
    ids, weights = route(logits, logits.shape[1], 4, False, torch.float32)
    assert ids.tolist() == [[1, 3, 2, 4]]
    assert weights[0, 0] == weights[0, 1] > weights[0, 2] == weights[0, 3]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("sign", [1, -1])
def test_route_names_existing_and_distinct_experts_whatever_the_logits(device: str, sign: int) -> None:
    nan = torch.full((1, 60), float("nan"), device=device).copysign(torch.tensor(float(sign), device=device))
    ids, weights = route(nan, nan.shape[1], 8, True, torch.float32)
    assert sorted(set(ids[0].tolist())) == sorted(ids[0].tolist())
    assert ids.min() >= 0 and ids.max() < 60
    assert weights.isnan().all()
