"""`minipaged bench --gpu` without a GPU: it refuses, and its shapes, bytes and tables are right on a CPU."""

from __future__ import annotations

import pytest
import torch

from minipaged import cli
from minipaged.attention import eager
from minipaged.bench import gpu
from minipaged.bench.gpu import BY_BLOCK, Paged, Shape

CPU = torch.device("cpu")
TINY = Shape(layers=2, heads=4, kv_heads=2, head_dim=16, ffn=128, dtype=torch.float32)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a millisecond for each layer."""
    def seconds(call, device, repeats=20):
        call()
        return 0.002

    monkeypatch.setattr(gpu, "seconds", seconds)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_refuses_and_says_what_there_is_instead(capsys):
    assert cli.main(["bench", "--gpu"]) == 2
    error = capsys.readouterr().err
    assert "sees no GPU" in error and "kernels --report" in error


@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_paged_and_contiguous_compute_the_same(block_size):
    paged = Paged(TINY, CPU, batch=3, context=40, block_size=block_size)
    assert sorted(paged.batch.block_tables.flatten().tolist()) == list(range(3 * -(-40 // block_size)))
    got, scale = paged(), TINY.head_dim ** -0.5
    torch.testing.assert_close(got, paged.contiguous()(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got, eager.attend(paged.query, *paged.cache.layers[1], paged.batch, scale), atol=1e-5,
                               rtol=1e-5)


def test_the_attention_table_has_the_papers_points_and_counts_every_key_and_value(ticks):
    lines = gpu.attention_table(TINY, CPU).splitlines()
    assert len(lines) == 3 + 6
    cells = lines[-1].split()
    assert cells[:4] == ["32", "256", "1000.0", "1000.0"]  # one layer's share of two
    assert cells[4:6] == ["+0", "+21"], "the paper's 235.3 us against 194.5"
    assert float(cells[6]) == round(32 * 256 * 2 * 2 * 16 * 4 / 1e-3 / 1e9, 1)
    assert float(cells[7]) == pytest.approx(100 * 32 * 256 * 256 / 1e-3 / (2 * (1 << 20) / 0.002), rel=0.01)


def test_block_sizes_and_swaps_have_a_line_each(ticks):
    sizes = [str(2**i) for i in range(9)]
    for table in gpu.block_size_table(TINY, CPU, 2, 8), gpu.swap_table(TINY, CPU):
        assert [line.split()[0] for line in table.splitlines()[3:]] == sizes
    last = table.splitlines()[-1].split()
    assert last[1:] == ["2.0", "2.0", "2.0", "2.0", "4.0", "16.1", "17.3", "39.1"], "two layers recompute twice as long"


def test_block_by_block_moves_the_same_as_all_at_once():
    data, host = torch.randn(2, 2, 6, 8, 2, 16), torch.zeros(2, 2, 3, 8, 2, 16)
    BY_BLOCK.swap_out(data, host, [(5, 0), (2, 1)])
    assert torch.equal(host[:, :, [0, 1]], data[:, :, [5, 2]]) and not host[:, :, 2].any()


def test_what_is_moved_is_what_the_paper_moved():
    """210 MB: 256 tokens of OPT-13B, two bytes each number."""
    assert 40 * Shape().kv_bytes(gpu.MOVED_TOKENS) == 256 * 40 * 2 * 5120 * 2 == 209_715_200


def test_every_block_size_serves_all_requests():
    table = gpu.engine_table("tiny-opt", "float32", requests=1, sizes=(8, 64))
    assert [line.split()[0] for line in table.splitlines()[3:]] == ["8", "64"]
    blocks = [int(line.split()[1]) for line in table.splitlines()[3:]]
    assert blocks[0] == 8 * blocks[1], "the same memory"


def test_the_clock_takes_the_median_of_warm_calls():
    calls = []
    assert 0 < gpu.seconds(lambda: calls.append(sum(range(1000))), CPU, 5) < 0.1
    assert len(calls) == 8
