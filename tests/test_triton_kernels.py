"""The Triton kernels' numbers, under Triton's interpreter on the CPU, against Eq. 4 written naively.

Triton decides at its import whether it interprets, so the tests of `TestKernels` run in a pytest of their own with
TRITON_INTERPRET=1, which `test_under_the_interpreter` starts. To run one of them by hand:
``TRITON_INTERPRET=1 pytest tests/test_triton_kernels.py -k split``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from batches import TOLERANCE, UGLY, make_batch
from minipaged.attention import eager
from minipaged.errors import InvalidConfig
from minipaged.memory.cache import KVCache

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BLOCK_SIZES, HEAD_DIMS = [8, 16, 32, 64, 128, 256], [64, 80, 96, 128, 256]


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_under_the_interpreter():
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", __file__],
                         env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)


if INTERPRETED:
    from triton.runtime import interpreter

    from minipaged.attention import triton_blocks, triton_kernels as kernels

    @pytest.fixture(autouse=True, scope="module")
    def bfloat16_products():
        """Triton's interpreter multiplies the bits of bfloat16 numbers as integers; here as the numbers they are."""
        dot = interpreter.InterpreterBuilder.create_dot

        def create_dot(self, a, b, *rest):
            return dot(self, *(self.cast_impl(x, interpreter.tl.float32) if x.dtype.scalar.is_bf16() else x
                               for x in (a, b)), *rest)

        interpreter.InterpreterBuilder.create_dot = create_dot
        yield
        interpreter.InterpreterBuilder.create_dot = dot


def check(queries: list[int], contexts: list[int], parts: int | None = None, block_size: int = 16, group: int = 2,
          kv_heads: int = 1, head_dim: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0,
          **options: torch.dtype) -> None:
    """Run the kernels and Eq. 4 on the same batch."""
    query, keys, values, batch, tables = make_batch(queries, contexts, block_size, group, kv_heads, head_dim, dtype,
                                                    seed, **options)
    got = kernels.attend(query, keys, values, batch, head_dim ** -0.5, parts)
    expected = torch.cat([eager.attend_one(q, keys, values, table, context, head_dim ** -0.5)
                          for q, table, context in zip(query.split(queries), tables, contexts)])
    assert got.dtype == dtype and got.shape == query.shape
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


class TestKernels:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("block_size", [1, 8, 13, 16, 32, 64, 256])
    @pytest.mark.parametrize("parts", [1, 2, 8])
    def test_decode_at_block_and_part_boundaries(self, block_size, parts):
        check([1] * len(UGLY), UGLY, parts, block_size)

    @pytest.mark.parametrize("group", [1, 2, 3, 5, 7, 8])
    @pytest.mark.parametrize("kv_heads", [1, 3])
    def test_heads_that_share_a_kv_head(self, group, kv_heads):
        check([1, 1, 12], [5, 70, 40], 2, group=group, kv_heads=kv_heads)

    @pytest.mark.parametrize("block_size", BLOCK_SIZES)
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_every_block_size_with_every_head_dim_and_type(self, block_size, head_dim, dtype):
        """One token, a block but one, a whole block and one past it: decoding, whole prompts and the rest of prompts."""
        contexts = [1, block_size - 1, block_size, block_size + 1]
        for queries, parts in ([1, 1, 1, 1], 2), ([1, min(block_size - 1, 40), 5, 2], None):
            check(queries, contexts, parts, block_size, group=3, head_dim=head_dim, dtype=dtype)

    @pytest.mark.parametrize("head_dim", [16, 32, 112, *HEAD_DIMS])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_head_dims_and_types(self, head_dim, dtype):
        for parts in 1, 4:
            check([1, 70, 1, 9], [33, 70, 200, 41], parts, head_dim=head_dim, dtype=dtype, kv_heads=2)

    @pytest.mark.parametrize("block_size", [1, 8, 13, 16, 32, 64, 256])
    def test_prompts_with_and_without_a_context_before_them(self, block_size):
        whole = [2, 7, 8, 9, 65]
        check([*whole, 2, 3, 40, 16], [*whole, 3, 65, 64, 100], block_size=block_size, group=3)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_a_prompt_longer_than_a_program_of_each_type(self, dtype):
        check([150], [171], dtype=dtype, group=3)

    @pytest.mark.parametrize("seed", range(12))
    def test_random_mixed_batches(self, seed):
        random.seed(1000 + seed)
        contexts = [random.choice(UGLY) for _ in range(random.randint(1, 6))]
        queries = [random.choice([1, 1, min(context, random.randint(1, 40)), context]) for context in contexts]
        check(queries, contexts, parts=random.choice([None, 1, 2, 4, 16]), block_size=random.choice([8, 16, 32, 64]),
              group=random.randint(1, 8), kv_heads=random.randint(1, 3), head_dim=random.choice([64, 80, 96]),
              dtype=random.choice([*TOLERANCE]), seed=seed)

    def test_large_scores_do_not_overflow(self):
        """Of whole numbers, so that the scores, thousands, are exact in whatever order a machine adds them up."""
        query, keys, values, batch, tables = make_batch([1, 20], [90, 50], 16, 2, 1, 64, torch.float32, 0)
        query, keys = (query * 100).round(), keys.round()
        for parts in 1, 4:
            got = kernels.attend(query, keys, values, batch, 1.0, parts)
            expected = eager.attend(query, keys, values, batch, 1.0)
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_a_query_that_is_not_contiguous(self):
        """As transformers gives it: heads before tokens."""
        query, keys, values, batch, _ = make_batch([1, 9], [40, 9], 16, 2, 2, 64, torch.float32, 0)
        got = kernels.attend(query.transpose(0, 1).contiguous().transpose(0, 1), keys, values, batch, 0.125)
        torch.testing.assert_close(got, eager.attend(query, keys, values, batch, 0.125), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("kv_heads, head_dim", [(1, 64), (3, 80), (40, 128)])
    @pytest.mark.parametrize("some", [False, True])
    def test_write(self, dtype, kv_heads, head_dim, some):
        key, value = torch.randn(2, 9, kv_heads, head_dim).to(dtype)
        data = torch.full((2, 4, 8, kv_heads, head_dim), float("nan"), dtype=dtype)
        slots = torch.tensor([31, 0, -1, 9, 8, 17, 30, 2, 16])
        rows = torch.tensor([8, 3, 1, 0]) if some else None
        slots = slots[:4] if some else slots
        expected = data.clone().flatten(1, 2)
        for row, slot in zip(rows.tolist() if some else range(9), slots.tolist()):
            if slot >= 0:
                expected[0, slot], expected[1, slot] = key[row], value[row]
        triton_blocks.reshape_and_cache(key, value, *data, slots, rows)
        assert_same_bits(data.flatten(1, 2), expected)

    @pytest.mark.parametrize("dtype", TOLERANCE)
    @pytest.mark.parametrize("pairs", [[], [(1, 4)], [(1, 4), (1, 5), (0, 2)], [(0, 1), (1, 2), (2, 0)]],
                             ids=["none", "one", "several", "a source that is a destination"])
    def test_copy(self, dtype, pairs):
        data = torch.randn(3, 2, 6, 16, 3, 80).to(dtype)  # two programs for a block
        expected = data.clone()
        expected[:, :, [write for _, write in pairs]] = data[:, :, [read for read, _ in pairs]]
        triton_blocks.copy_blocks(data, pairs)
        assert_same_bits(data, expected)

    def test_gather_and_scatter(self):
        data = torch.randn(3, 2, 6, 13, 2, 64)
        staging = triton_blocks.gather_blocks(data, [5, 0, 3])
        assert_same_bits(staging, data[:, :, [5, 0, 3]])
        other = torch.zeros(3, 2, 9, 13, 2, 64)
        triton_blocks.scatter_blocks(staging, other, [8, 1, 2])
        assert_same_bits(other[:, :, [8, 1, 2]], staging)
        assert not other[:, :, [0, 3, 4, 5, 6, 7]].any()

    def test_swapping_through_the_cache(self):
        """As the engine moves blocks: to the host's pool, and back to other blocks; the rest stays as it is."""
        cache = KVCache(3, 7, 5, 8, 2, 64, torch.float16, torch.device("cpu"), triton_blocks.MOVES)
        cache.data.normal_(), cache.host.normal_()
        data, host = cache.data.clone(), cache.host.clone()
        cache.swap_out([(6, 0), (2, 4)])
        host[:, :, [0, 4]] = data[:, :, [6, 2]]
        assert_same_bits(cache.host, host)
        cache.swap_in([(4, 1), (0, 3)])
        data[:, :, [1, 3]] = host[:, :, [4, 0]]
        cache.copy_blocks([(1, 5), (5, 2)])
        data[:, :, [5, 2]] = data[:, :, [1, 5]]
        assert_same_bits(cache.data, data)
        for move in cache.copy_blocks, cache.swap_out, cache.swap_in:
            move([])
        assert_same_bits(cache.data, data)

    def test_pools_of_more_than_2_to_the_31_elements(self):
        """The memory is only asked for: of a pool of 2^31 elements and some, three blocks are touched."""
        blocks, shape = 2 ** 31 // (16 * 64) + 3, (16, 1, 64)
        data = torch.empty(1, 2, blocks, *shape, dtype=torch.float16)
        query, keys, values, batch, tables = make_batch([1, 9], [21, 9], 16, 2, 1, 64, torch.float16, 0,
                                                        table_dtype=torch.int32)
        far = {block: blocks - 1 - i for i, block in enumerate(sum(tables, []))}
        for block, to in far.items():
            triton_blocks.copy_blocks(data, [(0, to)])
            positions = torch.arange(to * 16, to * 16 + 16)
            triton_blocks.reshape_and_cache(keys[block], values[block], *data[0], positions)
            assert_same_bits(data[0, :, to], torch.stack([keys[block], values[block]]))
        expected = kernels.attend(query, keys, values, batch, 0.125)
        batch.block_tables = torch.tensor([[far.get(block, 0) for block in table] for table in
                                           batch.block_tables.tolist()], dtype=torch.int32)
        assert torch.equal(kernels.attend(query, *data[0], batch, 0.125), expected)
        assert_same_bits(triton_blocks.gather_blocks(data, [blocks - 1])[0, 0, 0], data[0, 0, blocks - 1])

    def test_the_split_fills_the_gpu_and_no_more(self):
        assert kernels.parts_of(32 * 40, 4096, 108) == 1, "a large batch fills it already"
        assert kernels.parts_of(1 * 8, 100, 108) == 1, "a short context is not worth it"
        assert kernels.parts_of(1 * 8, 4096, 108) == 16, "no part is shorter than 256 tokens"
        assert kernels.parts_of(1 * 8, 100_000, 108) == 16, "27 parts, down to a power of two"
        assert kernels.parts_of(1, 10 ** 6, 108) == 64

    @pytest.mark.parametrize("head_dim, dtype, block_size, word", [
        (72, torch.float32, 16, "head dims"), (8, torch.float32, 16, "head dims"),
        (288, torch.float32, 16, "head dims"), (64, torch.float64, 16, "float16"),
        (64, torch.float32, 512, "block sizes")])
    def test_what_is_refused(self, head_dim, dtype, block_size, word):
        assert word in kernels.supported(head_dim, dtype, block_size)
        query, keys, values, batch, _ = make_batch([1], [3], block_size, 1, 1, head_dim, dtype, 0)
        with pytest.raises(InvalidConfig, match=word):
            kernels.attend(query, keys, values, batch, 1.0)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal, NaNs too."""
    assert torch.equal(torch.nan_to_num(got.float(), nan=12345.0), torch.nan_to_num(expected.float(), nan=12345.0))


@pytest.mark.skipif(INTERPRETED, reason="asks as a user does")
def test_the_engine_says_why_it_does_not_use_them_here():
    from minipaged import LLM, Trace

    if torch.cuda.is_available():
        pytest.skip("there is a GPU to use them on")
    with pytest.raises(InvalidConfig, match="TRITON_INTERPRET=1"):
        LLM("tiny-opt", attention="triton")
    trace = Trace()
    LLM("tiny-opt", num_gpu_blocks_override=4, trace=trace).close()
    assert trace.events[0].attention == "cpu"
    assert trace.events[0].attention_reason.startswith("cpu: the device is a CPU; linear layers ")


@pytest.mark.skipif(not INTERPRETED, reason="runs under the interpreter")
def test_the_engine_gives_the_same_tokens_with_them():
    """Prompts and decoding mixed, through copy-on-write and preemption."""
    from minipaged import LLM, SamplingParams

    prompts = [[10, 11, 12, 13, 14], [20, 21, 22], [30] * 9]
    params = [SamplingParams(temperature=0, max_tokens=4), SamplingParams(n=2, seed=3, max_tokens=4),
              SamplingParams(temperature=0, max_tokens=3)]
    tokens = {}
    for attention in ("triton", "eager"):
        with LLM("tiny-opt", attention=attention, block_size=8, num_gpu_blocks_override=5, audit=True) as llm:
            tokens[attention] = [[o.token_ids for o in out.outputs] for out in llm.generate(prompts, params)]
    assert tokens["triton"] == tokens["eager"]
