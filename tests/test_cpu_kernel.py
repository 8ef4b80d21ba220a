"""The compiled CPU kernel against Eq. 4, and what is chosen where it cannot run."""

from __future__ import annotations

import os
import platform
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from batches import TOLERANCE, UGLY, make_batch
from minipaged import LLM, SamplingParams, Trace, backends, compiled
from minipaged.attention import cpu, eager, plain, write
from minipaged.errors import InvalidConfig

DTYPES = torch.float32, torch.bfloat16


def check(queries: list[int], contexts: list[int], block_size: int = 16, group: int = 2, kv_heads: int = 1,
          head_dim: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
    query, keys, values, batch, _ = make_batch(queries, contexts, block_size, group, kv_heads, head_dim, dtype, seed)
    got = cpu.attend(query, keys, values, batch, head_dim ** -0.5)
    expected = eager.attend(query, keys, values, batch, head_dim ** -0.5)
    assert got.dtype == dtype and got.shape == query.shape
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.fixture
def every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is shared out, however small it is, and on a machine with a single core too."""
    monkeypatch.setattr(cpu, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 8, 13, 16, 32, 64, 256])
def test_decode_at_block_boundaries(block_size, dtype):
    check([1] * len(UGLY), UGLY, block_size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [None, [0, 2, 3]])
def test_new_tokens_go_to_their_slots(rows, dtype):
    """All of them, or some; the keys lie between queries and values, as in the product that computes all three."""
    _, new_keys, new_values = torch.randn(4, 3, 2, 8).to(dtype).unbind(1)  # [tokens, kv_heads, head_dim]
    slots = torch.tensor([17, 3, 8, 0][:len(rows or range(4))])
    chosen = None if rows is None else torch.tensor(rows)
    got, expected = torch.zeros(2, 2, 3, 7, 2, 8).to(dtype)  # [by whom, (key, value), blocks, block_size, …]
    cpu.write(new_keys, new_values, *got, slots, chosen)
    write(new_keys, new_values, *expected, slots, chosen)
    assert expected.any() and torch.equal(got, expected)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kv_heads", [1, 3])
def test_heads_that_share_a_kv_head(group, kv_heads):
    check([1, 1, 12], [5, 70, 40], group=group, kv_heads=kv_heads)


@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims_and_types(head_dim, dtype):
    check([1, 70, 1, 9], [33, 70, 200, 41], head_dim=head_dim, dtype=dtype, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_stays_with_its_head(value, head_dim, dtype, every_thread):
    """Of a token's value it reaches its own place of the output, of a key the whole head; as in Eq. 4."""
    query, keys, values, batch, tables = make_batch([1, 1], [40, 21], 16, 1, 3, head_dim, dtype, 0)
    keys[tables[0][1], 3, 1, head_dim - 1], values[tables[1][0], 5, 2, head_dim - 1] = float("nan"), value
    got, expected = (backend.attend(query, keys, values, batch, 0.125) for backend in (cpu, eager))
    assert not expected[0, 1].isfinite().any() and expected[0, [0, 2]].isfinite().all()
    assert (~expected[1].isfinite()).nonzero().tolist() == [[2, head_dim - 1]]
    torch.testing.assert_close(got, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [[1, 1, 1], [1, 5, 1], [1]])
def test_queries_lie_as_a_product_or_transformers_leave_them(queries, dtype):
    query, keys, values, batch, _ = make_batch(queries, [40, 9, 33][:len(queries)], 16, 2, 2, 64, dtype, 0)
    expected = cpu.attend(query, keys, values, batch, 0.125)
    beside = torch.stack([query, torch.full_like(query, torch.nan)], 1)[:, 0]  # rows of a wider product
    by_head = query.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    for view in beside, by_head:
        got = cpu.attend(view, keys, values, batch, 0.125)
        assert got.is_contiguous() and torch.equal(got, expected)
    alike = query[:1].expand(query.shape)
    assert torch.equal(cpu.attend(alike, keys, values, batch, 0.125), cpu.attend(alike.clone(), keys, values, batch, 0.125))
    with pytest.raises(AssertionError, match="type"):
        cpu.attend(query.double(), keys, values, batch, 0.125)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by a call of Linux")
@pytest.mark.parametrize("head_dim", [16, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_read_behind_the_cache(dtype, head_dim):
    """One token in the cache's last slot, behind which lies a page that must not be touched."""
    script = ("import ctypes, mmap, sys; sys.path.insert(0, sys.argv[1])\nimport torch; from batches import make_batch\n"
              "from minipaged.attention import cpu\n"
              f"dtype, head_dim = torch.{dtype}, {head_dim}\n"
              "query, *_, batch, _ = make_batch([1], [1], 1, 1, 1, head_dim, dtype, 0)\n"
              "batch.block_tables[:] = 0\n"
              "def at_the_end():\n"
              "    memory, page = mmap.mmap(-1, 2 * mmap.PAGESIZE), mmap.PAGESIZE\n"
              "    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))\n"
              "    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), page, 0) == 0\n"
              "    x = torch.frombuffer(memory, dtype=dtype, count=page // dtype.itemsize)\n"
              "    return x[-head_dim:].view(1, 1, 1, head_dim).fill_(3)\n"
              "print(*set(cpu.attend(query, at_the_end(), at_the_end(), batch, 1.0).flatten().tolist()))")
    run = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout == "3.0\n", (run.returncode, run.stderr)


def test_registers_half_as_wide():
    """As on a processor without AVX-512: eight tokens at a time."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\nimport test_cpu_kernel as tests\n"
              "for dtype in tests.DTYPES: tests.check([1] * 3, [5, 33, 130], head_dim=72, dtype=dtype)\n"
              "from minipaged.decoding import LANES; print(LANES)")
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2"}
    run = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True,
                         env=os.environ | (older if platform.machine() == "x86_64" else {}))
    assert run.returncode == 0 and run.stdout == "8\n", run.stderr


@pytest.mark.parametrize("seed", range(20))
def test_random_mixed_batches(seed, every_thread):
    random.seed(2000 + seed)
    contexts = [random.choice(UGLY) for _ in range(random.randint(1, 8))]
    queries = [random.choice([1, 1, min(context, random.randint(1, 40)), context]) for context in contexts]
    check(queries, contexts, block_size=random.choice([1, 5, 16, 64]), group=random.randint(1, 6),
          kv_heads=random.randint(1, 3), head_dim=random.choice([16, 64, 80, 96]), dtype=random.choice(DTYPES),
          seed=seed)


def test_large_scores_do_not_overflow():
    """Of whole numbers, so that the scores, thousands, are exact in whatever order a machine adds them up."""
    query, keys, values, batch, _ = make_batch([1, 1], [90, 50], 16, 2, 1, 64, torch.float32, 0)
    query, keys = (query * 100).round(), keys.round()
    torch.testing.assert_close(cpu.attend(query, keys, values, batch, 1.0),
                               eager.attend(query, keys, values, batch, 1.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_plain_pytorch(dtype):
    query, keys, values, batch, _ = make_batch([1, 9, 3], [40, 9, 33], 16, 2, 2, 64, dtype, 0)
    torch.testing.assert_close(plain.attend(query, keys, values, batch, 0.125),
                               eager.attend(query, keys, values, batch, 0.125), atol=TOLERANCE[dtype],
                               rtol=TOLERANCE[dtype])


def test_threads_share_the_tokens_evenly(every_thread):
    _, _, _, batch, _ = make_batch([1, 1, 5, 1, 1, 1], [100, 10, 9, 60, 55, 20], 16, 1, 1, 16, torch.float32, 0)
    shares = cpu._shares(batch, 128)
    pieces = [piece for share in shares for piece in share]
    read = [(sequence, token) for sequence, _, first, end in pieces for token in range(first, end)]
    assert read == [(i, token) for i in (0, 1, 3, 4, 5) for token in range(batch.context_lens[i])], "no prompt's"
    assert [row for _, row, *_ in pieces] == [batch.starts[sequence] for sequence, *_ in pieces]
    assert all(first % cpu.LANES == 0 for *_, first, _ in pieces), "cut where no register of scores is torn apart"
    sizes = [sum(end - first for *_, first, end in share) for share in shares]
    assert max(sizes) - min(sizes) < 2 * cpu.LANES
    assert len(pieces) == {16: 6, 8: 7}[cpu.LANES], "cut where a share ends within one"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [5, 16, 64])
@pytest.mark.parametrize("queries, contexts", [([1], [2000]), ([1], [17]), ([1, 1, 3, 1], [40, 700, 9, 1])])
def test_a_sequence_that_several_threads_read(queries, contexts, block_size, dtype, every_thread):
    check(queries, contexts, block_size, group=3, kv_heads=2, dtype=dtype)


@pytest.mark.parametrize("where", ["first", "last"])
def test_pieces_of_a_sequence_weigh_as_their_scores_say(where, every_thread):
    """All attention goes to one token, in a piece of its own: the others' sums must vanish beside it."""
    query, keys, values, batch, tables = make_batch([1], [90], 16, 1, 2, 64, torch.float32, 0)
    slot = {"first": (tables[0][0], 0), "last": (tables[0][5], 9)}[where]
    keys[slot] = 50 * query[0]
    got = cpu.attend(query, keys, values, batch, 1.0)
    assert len(cpu._shares(batch, 1 << 20)[0]) == 1 and len(cpu._shares(batch, 1 << 20)) == 3
    torch.testing.assert_close(got[0], values[slot], atol=1e-6, rtol=1e-6)


def test_little_work_wakes_no_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    _, _, _, batch, _ = make_batch([1] * 4, [20] * 4, 16, 1, 1, 16, torch.float32, 0)
    for token_bytes, threads in ((128, 1), (cpu.WORTH_A_THREAD // 80, 1), (cpu.WORTH_A_THREAD // 20, 4),
                                 (cpu.WORTH_A_THREAD, 8)):
        assert len(cpu._shares(batch, token_bytes)) == threads


def test_calls_from_several_threads(every_thread):
    """Two LLMs may generate at the same time."""
    cases = [make_batch([1] * 6, [50 + seed] * 6, 16, 2, 2, 64, torch.float32, seed)[:4] for seed in range(4)]
    expected = [eager.attend(*case, 0.125) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda case: cpu.attend(*case, 0.125), cases), expected):
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_withoutgnu_openmp_pythons_threads_do_the_work(dtype, every_thread, monkeypatch):
    seen = []
    in_threads = compiled._in_threads
    monkeypatch.setattr(compiled, "gnu_openmp", lambda: None)
    monkeypatch.setattr(compiled, "_in_threads", lambda numbers: seen.append(numbers[0]) or in_threads(numbers))
    check([1, 1, 5, 1, 1], [100, 10, 9, 60, 55], dtype=dtype)
    assert seen == [3]


def test_fewer_threads_than_asked_for_do_all_of_the_work():
    """OpenMP gives no more than OMP_THREAD_LIMIT says."""
    script = ("import sys; sys.path.insert(0, sys.argv[1])\n"
              "import torch, test_cpu_kernel as tests; from minipaged.attention import cpu\n"
              "cpu.WORTH_A_THREAD = 1; torch.get_num_threads = lambda: 5; tests.check([1] * 7, [60] * 7)")
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], check=True,
                   env=os.environ | {"OMP_THREAD_LIMIT": "2"})


def test_the_exponential():
    """To five units in the last place where it counts; what is too small for float32 is as good as nothing."""
    x = np.concatenate([-np.logspace(-8, np.log10(87), 2000), [0, -0.34657359, -0.34657360, -88, -1e4, -np.inf]])
    got = np.array([compiled.exp(np.float32(value)) for value in x])
    np.testing.assert_allclose(got, np.exp(x.astype(np.float32).astype(np.float64)), rtol=6e-6, atol=2e-38)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_chosen_on_a_cpu(dtype):
    trace = Trace()
    with LLM("tiny-opt", dtype=dtype, num_gpu_blocks_override=8, device="cpu", trace=trace) as llm:
        assert llm.engine.runner.backend.attend is cpu.attend
    start = trace.events[0]
    assert start.attention == "cpu" and start.attention_reason.startswith("cpu: the device is a CPU; linear layers ")


def test_where_it_cannot_run_plain_pytorch_does_and_says_so(monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=6)
    with LLM("tiny-opt", num_gpu_blocks_override=8, device="cpu") as llm:
        tokens = llm.generate([[10, 11, 12]], params)[0].outputs[0].token_ids
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    trace = Trace()
    with pytest.warns(UserWarning, match="numba"), \
            LLM("tiny-opt", num_gpu_blocks_override=8, device="cpu", trace=trace) as llm:
        assert llm.generate([[10, 11, 12]], params)[0].outputs[0].token_ids == tokens
    assert trace.events[0].attention == "torch" and trace.events[0].attention_reason.count("numba") == 2
    with pytest.raises(InvalidConfig, match="numba"):
        LLM("tiny-opt", attention="cpu", device="cpu")


def test_a_type_that_it_does_not_take(monkeypatch):
    with pytest.warns(UserWarning, match="float32 and bfloat16, not float16"), \
            LLM("tiny-opt", dtype="float16", num_gpu_blocks_override=8, device="cpu") as llm:
        assert llm.engine.runner.backend.attend is plain.attend
        assert len(llm.generate([[10, 11, 12]], SamplingParams(max_tokens=3))[0].outputs[0].token_ids) == 3
    with pytest.raises(InvalidConfig, match="float32 and bfloat16, not float16"):
        LLM("tiny-opt", dtype="float16", attention="cpu", device="cpu")


def test_where_no_folder_takes_files(tmp_path):
    """As in a read-only installation without a home: compiled anew in each process, but it runs."""
    script = ("import numba.core.caching as caching; caching.CacheImpl._locator_classes = []\n"
              "import sys; sys.path.insert(0, sys.argv[1])\n"
              "import test_cpu_kernel; test_cpu_kernel.check([1], [20])\n"
              "from minipaged import decoding\n"
              "print(type(decoding.attending(test_cpu_kernel.DTYPES[0])._cache).__name__)")
    run = subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], capture_output=True, text=True,
                         env=os.environ | {"NUMBA_CACHE_DIR": ""}, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["NullCache"]
