from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as softcap_attention
from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as sink_attention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import apply_rotary_pos_emb as apply_full_rotary_pos_emb

from actors.executor.gpu import attention_kernels
from actors.executor.gpu.attention_kernels import decode_attention, rotate_and_store

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter truncates to bfloat16, where a GPU rounds.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_ROWS = 6  # of the caches


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class Step:
    """Inputs of rotate_and_store for a few tokens, and caches full of NaN."""

    def __init__(
        self,
        device: str,
        dtype: torch.dtype,
        batch: int,
        heads: tuple[int, int],
        head_dim: int,
        rotary_dim: int,
    ) -> None:
        self.num_q, self.num_kv = heads
        self.qkv = random(batch, (self.num_q + 2 * self.num_kv) * head_dim, dtype=dtype, device=device)
        angles = random(batch, rotary_dim // 2, dtype=torch.float32, device=device, seed=1).repeat(1, 2)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.rows = (torch.arange(batch, device=device) * 5 + 2) % NUM_ROWS
        self.positions = (torch.arange(batch, device=device) * 3 + 1) % 7
        shape = (NUM_ROWS, self.num_kv, 7, head_dim)
        self.keys, self.values = torch.full((2, *shape), float("nan"), dtype=dtype, device=device).unbind()
        self.norms = [random(head_dim, dtype=dtype, device=device, seed=seed) for seed in (2, 3)]

    def run(self, norms: bool, items: slice = slice(None)) -> Tensor:
        """Returns the queries; keys and values are in the caches."""
        inputs = (tensor[items] for tensor in (self.qkv, self.cos, self.sin, self.positions, self.rows))
        return rotate_and_store(*inputs, self.keys, self.values, *(self.norms if norms else ()), eps=1e-5)

    def reference(self, norms: bool, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, heads, head_dim] of queries, keys and values."""
        heads = self.qkv.view(len(self.qkv), -1, self.keys.shape[-1])
        q, k, v = heads.split([self.num_q, self.num_kv, self.num_kv], dim=1)
        if norms:
            q, k = (self._norm(states, weight) for states, weight in zip((q, k), self.norms, strict=True))
        rotate = apply_full_rotary_pos_emb if full else apply_rotary_pos_emb
        return *rotate(q, k, self.cos, self.sin), v

    @staticmethod
    def _norm(states: Tensor, weight: Tensor) -> Tensor:
        module = Qwen3MoeRMSNorm(len(weight), eps=1e-5)
        module.weight.data = weight
        return module(states)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary_dim"), [((4, 2), 16, 16), ((3, 1), 24, 24), ((2, 2), 24, 8)], ids=str
)
def test_rotation_and_caches_equal_the_library(
    device: str, dtype: torch.dtype, norms: bool, heads: tuple[int, int], head_dim: int, rotary_dim: int
) -> None:
    step = Step(device, dtype, 3, heads, head_dim, rotary_dim)
    q = step.run(norms)
    stored = [cache[step.rows, :, step.positions] for cache in (step.keys, step.values)]
    for actual, expected in zip(
        (q, *stored), step.reference(norms, full=head_dim == rotary_dim), strict=True
    ):
        assert actual.dtype == dtype
        assert_near(actual, expected, dtype)
        if not norms and (device == "cuda" or dtype != torch.bfloat16):
            assert torch.equal(actual, expected)


def test_rotation_writes_nothing_else(device: str) -> None:
    step = Step(device, torch.float32, 3, (4, 2), 16, 16)
    step.run(norms=True)
    for cache in (step.keys, step.values):
        written = ~cache.isnan()
        assert written[step.rows, :, step.positions].all()
        assert written.sum() == 3 * 2 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rotated_row_does_not_depend_on_the_batch(device: str, dtype: torch.dtype) -> None:
    step = Step(device, dtype, 20, (2, 1), 24, 16)
    q = step.run(norms=True, items=slice(3, 4))
    row, position = step.rows[3], step.positions[3]
    k = step.keys[row, :, position].clone()
    for batch in (5, 20):
        step.keys.fill_(float("nan"))
        step.rows = torch.arange(20, device=device) % 2  # row 1 is written last by one item only
        step.rows[3], step.positions[3] = row, position
        assert torch.equal(step.run(norms=True, items=slice(0, batch))[3:4], q)
        assert torch.equal(step.keys[row, :, position], k)


class Case:
    """One attention call: caches whose positions beyond each row's own hold NaN."""

    def __init__(
        self, device: str, dtype: torch.dtype, positions: list[int],
        heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 16), num_tokens: int = 40,
    ) -> None:  # fmt: skip
        (self.num_q, num_kv), (head_dim, value_dim) = heads, dims
        batch = len(positions)
        self.q = random(batch, self.num_q, head_dim, dtype=dtype, device=device)
        self.keys = random(batch + 1, num_kv, num_tokens, head_dim, dtype=dtype, device=device, seed=1)
        self.values = random(batch + 1, num_kv, num_tokens, value_dim, dtype=dtype, device=device, seed=2)
        self.rows = torch.arange(batch, 0, -1, device=device)
        self.positions = torch.tensor(positions, device=device)
        self.scaling = head_dim**-0.5
        for cache in (self.keys, self.values):
            cache[0] = float("nan")
            for row, position in zip(self.rows, positions, strict=True):
                cache[row, :, position + 1 :] = float("nan")

    def run(
        self, window: int | None = None, sinks: Tensor | None = None, softcap: float | None = None,
        items: slice = slice(None), chunk: int | None = None,
    ) -> Tensor:  # fmt: skip
        q, rows, positions = (tensor[items] for tensor in (self.q, self.rows, self.positions))
        return decode_attention(
            q, self.keys, self.values, rows, positions, self.scaling, window, sinks, softcap, chunk
        )

    def reference(
        self, window: int | None = None, sinks: Tensor | None = None, softcap: float | None = None
    ) -> Tensor:
        """The library's eager attention in fp32, row by row over the visible positions only."""
        module = SimpleNamespace(num_key_value_groups=self.num_q // self.keys.shape[1], training=False)
        if sinks is not None:
            module.sinks = sinks.float()
        outputs = []
        for item, position in enumerate(self.positions.tolist()):
            visible = slice(0 if window is None else max(0, position - window + 1), position + 1)
            k, v = (cache[self.rows[item], None, :, visible].float() for cache in (self.keys, self.values))
            q = self.q[item, None, :, None].float()
            if sinks is not None:
                outputs.append(sink_attention(module, q, k, v, None, self.scaling)[0])
            else:
                outputs.append(
                    softcap_attention(module, q, k, v, None, scaling=self.scaling, softcap=softcap)[0]
                )
        return torch.cat(outputs)[:, 0]


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_MAX_SPLIT", 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dims"),
    [((4, 2), (16, 16)), ((2, 2), (24, 16)), ((3, 1), (16, 24)), ((18, 1), (16, 16))],
    ids=["grouped", "latent", "odd values", "more than a tile of heads"],
)
def test_attention_equals_the_library(
    device: str, dtype: torch.dtype, heads: tuple[int, int], dims: tuple[int, int], small_splits: None
) -> None:
    case = Case(device, dtype, [15, 39], heads, dims)
    output = case.run()
    assert output.dtype == dtype
    assert_near(output, case.reference(), dtype)


@pytest.mark.parametrize("window", [1, 8, 17, 100])
def test_window_hides_older_positions(device: str, window: int, small_splits: None) -> None:
    case = Case(device, torch.float32, [3, 39])
    everything = case.run()
    for row, position in zip(case.rows, case.positions, strict=True):
        hidden = slice(0, max(0, int(position) - window + 1))
        case.keys[row, :, hidden] = case.values[row, :, hidden] = float("nan")
    output = case.run(window)
    assert_near(output, case.reference(window), torch.float32)
    assert torch.equal(output, everything) == (window == 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_sinks_equal_the_library(
    device: str, dtype: torch.dtype, window: int | None, small_splits: None
) -> None:
    case = Case(device, dtype, [0, 30])
    sinks = 3 * random(2, dtype=dtype, device=device, seed=3)
    output = case.run(window, sinks)
    assert_near(output, case.reference(window, sinks), dtype)
    assert (output - case.run(window)).abs().max() > 0.1


@pytest.mark.parametrize("chunk", [1, 8, 17, 100])
def test_chunk_hides_what_lies_before_it(device: str, chunk: int, small_splits: None) -> None:
    case = Case(device, torch.float32, [0, 7, 8, 20, 39])
    everything = case.run()
    starts = [int(position) // chunk * chunk for position in case.positions]
    for row, start in zip(case.rows, starts, strict=True):
        case.keys[row, :, :start] = case.values[row, :, :start] = float("nan")
    output = case.run(chunk=chunk)
    windows = [int(position) - start + 1 for position, start in zip(case.positions, starts, strict=True)]
    for item, window in enumerate(windows):
        assert_near(output[item], case.reference(window)[item], torch.float32)
    assert torch.equal(output, everything) == (chunk == 100)


def test_softcap_equals_the_library(device: str, small_splits: None) -> None:
    case = Case(device, torch.float32, [0, 30])
    case.q *= 200  # far into saturation, and where exp overflows
    output = case.run(softcap=5.0)
    assert_near(output, case.reference(softcap=5.0), torch.float32)
    assert (output - case.run()).abs().max() > 0.1


def test_many_splits_merge(device: str, small_splits: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_MERGED_SPLITS", 2)
    case = Case(device, torch.float32, [5, 76], heads=(1, 1), num_tokens=80)
    assert_near(case.run(), case.reference(), torch.float32)


def test_splits_of_full_size(device: str) -> None:
    case = Case(device, torch.bfloat16, [299, 127], heads=(2, 1), num_tokens=300)
    assert_near(case.run(), case.reference(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_batch(device: str, dtype: torch.dtype, small_splits: None) -> None:
    positions = [(7 * item + 16) % 20 for item in range(20)]  # of item 3: 17, in the second split
    case = Case(device, dtype, positions, heads=(1, 1), num_tokens=20)
    sinks = random(1, dtype=dtype, device=device, seed=3)
    alone = case.run(20, sinks, items=slice(3, 4))
    for batch in (5, 20):
        assert torch.equal(case.run(20, sinks, items=slice(0, batch))[3:4], alone)


def test_a_row_does_not_depend_on_who_computes_its_splits(
    device: str, small_splits: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(device, torch.float32, [39, 20])
    output = case.run()
    monkeypatch.setattr(attention_kernels, "_MAX_PROGRAMS", 1)  # one program takes all splits of a row's head
    assert torch.equal(case.run(), output)


def test_every_visible_position_counts(device: str, small_splits: None) -> None:
    """The control of all poisoned caches above: within the row's length a NaN does come through."""
    for position in (0, 17, 20):
        case = Case(device, torch.float32, [20])
        case.values[case.rows[0], :, position] = float("nan")
        assert case.run().isnan().all()
