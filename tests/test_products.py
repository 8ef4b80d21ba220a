"""Products with packed weights are what PyTorch's are, on every edge of a tile, and their tiles stay in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from minipaged import chains, compiled, products
from minipaged.chains import Chain, Step
from minipaged.products import ADD, COLUMNS, NORM, RELU, ROWS, STORE, pack

DTYPES = torch.float32, torch.bfloat16
EDGES = sorted({1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 5 * ROWS, 5 * ROWS + 1, 11 * ROWS + 3})


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work is shared out, however small it is, and on a machine with a single core too."""
    monkeypatch.setattr(chains, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def here(dtype: torch.dtype) -> None:
    if problem := products.problem(torch.zeros(2, 2, dtype=dtype)):
        pytest.skip(problem)


def compute(chain: Chain, *buffers: torch.Tensor) -> None:
    """All sections, at once."""
    compiled.run(chain.works(*buffers))


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, then: int) -> None:
    compute(Chain([Step(0, 1, packed, bias, out.shape[1], then)]), x, out)


def expected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, before: torch.Tensor,
             then: int) -> torch.Tensor:
    """In float64, rounded to x's type where PyTorch's operators, one after the other, would round."""
    product = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    product = product.to(x.dtype)
    return {STORE: product, RELU: product.relu(), ADD: product + before}[then]


def check(rows: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool, then: int) -> None:
    torch.manual_seed(rows)
    x, weight, offset = (torch.randn(*shape).to(dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    old = torch.randn(rows, outputs) if then == ADD else torch.full((rows, outputs), torch.nan)
    before = old.to(dtype)
    out, packed = before.clone(), pack(weight)
    assert packed.numel() == inputs * COLUMNS * -(-outputs // COLUMNS), "no panel is empty"
    multiply(x, packed, offset if bias else None, out, then)
    want = expected(x, weight, offset if bias else None, before, then)
    # Sums of so many terms, in another order; of bfloat16 one step of its 8 bits, where a sum lies between two.
    step = 2.0 ** -7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, want, rtol=step, atol=step * inputs ** 0.5)
    assert dtype == torch.float32 or (out == want).float().mean() > 0.97, "only sums between two numbers may differ"


@pytest.mark.parametrize("then", [STORE, RELU, ADD])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_edge(dtype, bias, then):
    """Rows that fill no tile, outputs that fill no panel, one panel for two threads."""
    here(dtype)
    for rows in EDGES:
        for inputs, outputs in (2, 1), (48, COLUMNS), (80, COLUMNS + 7), (256, 5 * COLUMNS - 1):
            check(rows, inputs, outputs, dtype, bias, then)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [2, 16, 50, 768])
def test_a_norm(dtype, width):
    """Of rows far from 0, of one that is the same number throughout, and of rows that do not lie together."""
    here(dtype)
    torch.manual_seed(width)
    for rows in 1, 2, 13:
        x, (weight, bias) = (3 * torch.randn(rows, width) + 40).to(dtype), torch.randn(2, width).to(dtype)
        x[0] = 5
        source, target = torch.zeros(2, rows, width + 3, dtype=dtype)
        source[:, :width] = x
        compute(Chain([Step(0, 1, weight, bias, width, NORM, 1e-3)]), source, target)
        want = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-3)
        step = 2.0 ** -7 if dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(target[:, :width].double(), want, rtol=step, atol=step)
        assert not target[:, width:].any(), "what lies behind a row is left alone"


def decoder_like(dtype: torch.dtype, rows: int) -> tuple[Chain, list[torch.Tensor], torch.Tensor]:
    """A chain in which every step reads what the one before has just written, its buffers, and what shall come of it."""
    torch.manual_seed(rows)
    (up, down), (weight, bias) = torch.randn(2, 3 * COLUMNS, 3 * COLUMNS) / 8, torch.randn(2, 3 * COLUMNS)
    up, down, weight, bias = (x.to(dtype) for x in (up, down, weight, bias))
    steps = [Step(0, 1, weight, bias, 3 * COLUMNS, NORM, 1e-5), Step(1, 2, pack(up), None, 3 * COLUMNS, RELU),
             Step(2, 0, pack(down), bias, 3 * COLUMNS, ADD)]
    buffers = [torch.randn(rows, 3 * COLUMNS).to(dtype), *torch.zeros(2, rows, 3 * COLUMNS, dtype=dtype)]
    want = buffers[0]
    for _ in range(8):
        inner = torch.nn.functional.linear(torch.layer_norm(want, [3 * COLUMNS], weight, bias, 1e-5), up).relu()
        want = want + torch.nn.functional.linear(inner, down, bias)
    return Chain(*4 * [steps], 4 * steps), buffers, want


@pytest.mark.parametrize("openmp", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_thread_begins_a_step_before_all_have_done_the_last(dtype, openmp, monkeypatch):
    here(dtype)
    if not openmp:
        monkeypatch.setattr(compiled, "gnu_openmp", lambda: None)
    for rows in 1, 2, 3, 5 * ROWS + 1:
        for _ in range(20):
            chain, buffers, want = decoder_like(dtype, rows)
            compute(chain, *buffers)
            step = 0.1 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(buffers[0], want, rtol=step, atol=5 * step)


@pytest.mark.parametrize("openmp", [True, False])
def test_works_that_are_shared_by_fewer_threads_than_others(openmp, monkeypatch):
    here(torch.float32)
    if not openmp:
        monkeypatch.setattr(compiled, "gnu_openmp", lambda: None)
    for parts in [1, 3, 2, 1, 3], [3, 1, 1, 2, 1], [1, 1, 1, 1, 1]:
        chain, buffers, want = decoder_like(torch.float32, 7)
        works = chain.works(*buffers)
        works[:, 0] = parts
        compiled.run(works)
        torch.testing.assert_close(buffers[0], want, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_panels_are_shared_among_threads(count, monkeypatch):
    here(torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    for panels in 1, 2, 3, 7, 8:
        check(3, 16, panels * COLUMNS, torch.float32, True, STORE)


def test_little_work_wakes_no_thread(monkeypatch):
    """A weight of a tile of rows; of one row more, which the weight is read a second time for."""
    here(torch.float32)
    parts, weight = [], pack(torch.zeros(8 * COLUMNS, 16))
    monkeypatch.setattr(compiled, "run", lambda works: parts.append(works[0, 0]))
    monkeypatch.setattr(chains, "WORTH_A_THREAD", 2 * weight.nbytes)
    for rows in 1, ROWS, ROWS + 1, 100 * ROWS:
        multiply(torch.zeros(rows, 16), weight, None, torch.zeros(rows, 8 * COLUMNS), STORE)
    compute(Chain(2 * [Step(0, 1, weight, None, 8 * COLUMNS)]), *torch.zeros(2, 1, 8 * COLUMNS))
    assert parts == [1, 1, 2, 2, 2]


def test_what_is_no_number_stays_none():
    """Blocks that are read after they were freed are found by it."""
    for dtype in DTYPES:
        here(dtype)
        for then in STORE, RELU, ADD:
            for bad in float("nan"), float("inf"):
                out = torch.zeros(1, 40, dtype=dtype)
                x = torch.zeros(1, 8, dtype=dtype)
                x[0, 5] = bad
                multiply(x, pack(torch.ones(40, 8, dtype=dtype)), None, out, then)
                assert (out.isnan() if bad != bad else out.isinf()).all()


def test_products_from_several_threads():
    here(torch.float32)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda rows: check(rows, 96, 200, torch.float32, True, RELU), [3, 17, 40, 5] * 5))


@pytest.mark.parametrize("shape, dtype, says", [((4, 4), torch.float16, "float32 and bfloat16, not in float16"),
                                                ((4, 3), torch.bfloat16, "3 inputs, which are no pairs")])
def test_what_cannot_be_packed(shape, dtype, says, monkeypatch):
    monkeypatch.setattr(products, "FEATURES", "+fma,+avx512bf16")
    assert says in products.problem(torch.zeros(*shape, dtype=dtype))
    assert products.problem(torch.zeros(4, 4)) is None
    monkeypatch.setattr(products, "FEATURES", "+fma4,+avx512bf")  # others, whose names begin alike
    assert products.problem(torch.zeros(4, 4)) == "this processor lacks fma"
    assert products.problem(torch.zeros(4, 4, dtype=torch.bfloat16)) == "this processor lacks avx512bf16"
    monkeypatch.setattr(products, "gnu_openmp", lambda: None)
    monkeypatch.setattr(products, "FEATURES", "+fma")
    assert "threads" in products.problem(torch.zeros(4, 4))


OLDER = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2"}


def python(script: str, **environment: str) -> str:
    run = subprocess.run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1])\n" + script,
                          str(Path(__file__).parent)], capture_output=True, text=True, env=os.environ | environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_a_processor_with_registers_half_as_wide():
    here(torch.float32)
    assert python("import torch, test_products as tests\n"
                  "assert tests.COLUMNS == 16 and tests.products.problem(torch.zeros(2, 2)) is None\n"
                  "for then in 0, 1, 2: tests.test_every_edge(torch.float32, True, then)\n"
                  "print(tests.products.problem(torch.zeros(2, 2, dtype=torch.bfloat16)))",
                  **OLDER) == "this processor lacks avx512bf16\n"


@pytest.mark.parametrize("rows", [1, ROWS, ROWS + 1, 3 * ROWS, 5 * ROWS + 1, 7 * ROWS + 3])
def test_the_next_panel_is_fetched_meanwhile(rows, monkeypatch):
    """All of it, once, by the tiles of a panel together; nothing by a tile alone, or behind the thread's last panel."""
    fetched = []
    monkeypatch.setattr(products, "finish", lambda *_: None)
    monkeypatch.setattr(products, "tile_sums", lambda x, panel, sums, ahead: fetched.append(
        (panel[0, 0], *ahead.flatten()[::COLUMNS])))
    packed = np.arange(5 * 7 * COLUMNS).reshape(5, 7, COLUMNS)  # a number's value is where it lies
    products.tiles.py_func(np.zeros((rows, 7)), packed, np.zeros(0), np.zeros((rows, 5 * COLUMNS)), 5 * COLUMNS, 1, 4, 0)
    tiles = sum(start == packed[1, 0, 0] for start, *_ in fetched)
    together = tiles // 5 + (tiles % 5 > 1)
    for panel in 1, 2:
        of = [n for start, *lines in fetched if start == packed[panel, 0, 0] for n in lines]
        assert of == together * packed[panel + 1, :, 0].tolist()
    assert not [lines for start, *lines in fetched if start == packed[3, 0, 0] and lines]


@pytest.mark.parametrize("element, product, environment", [
    ("float32", "vfmadd", {}), ("float32", "vfmadd", OLDER), ("uint16", "vdpbf16ps", {})])
def test_a_tile_stays_in_registers(element, product, environment):
    """Of every number of rows two loops, with two products for each row, in which nothing is stored; one fetches ahead."""
    here(torch.float32 if element == "float32" else torch.bfloat16)
    script = ("from numba import njit, types\nfrom minipaged import compiled, products\n"
              "tiles, kind = njit(**compiled.FAST)(products.tiles.py_func), types.{}\n"
              "tiles.compile((kind[:, ::1], kind[:, :, ::1], kind[::1], kind[:, ::1], *4 * [types.int64]))\n"
              "print(products.ROWS, *tiles.inspect_asm().values())")
    rows, assembly = python(script.format(element), **environment).split(maxsplit=1)
    loops = [body for _, body in re.findall(r"^(\.L\w+):\n((?:(?!^\.L\w+:).*\n)*?\s+j\w+\s+\1\n)", assembly, re.M)]
    loops = [body for body in loops if "APP" in body]
    assert sorted((body.count(product), body.count("prefetch")) for body in loops) == [
        (2 * count, fetched) for count in range(1, int(rows) + 1) for fetched in range(2)]
    assert not [line for body in loops for line in body.splitlines() if re.search(r"\tv?mov\w+\s+%\S+, .*\(", line)]


def test_numbers_are_known_to_lie_side_by_side(tmp_path):
    """Where a compiler does not know it, it takes them one at a time: a norm of 32 rows took 80 us, 12 when it knew."""
    here(torch.float32)
    assert python("import test_products as tests, torch\nfrom minipaged import chains, products\n"
                  "chain, buffers, _ = tests.decoder_like(torch.float32, 3)\ntests.compute(chain, *buffers)\n"
                  "for compiled in chains.normalise, products.tiles, products.finish:\n"
                  "    (kinds,) = compiled.signatures\n"
                  "    print(*[kind.layout for kind in kinds if hasattr(kind, 'layout')], sep='')",
                  NUMBA_CACHE_DIR=str(tmp_path)).split() == ["CCCC", "CCCC", "CCC"]


def test_machine_code_on_disk_is_of_these_sources(tmp_path):
    """A change in another file than that of the function that numba keeps, as a pull brings it."""
    here(torch.float32)
    package = shutil.copytree(Path(products.__file__).parent, tmp_path / "minipaged",
                              ignore=shutil.ignore_patterns("__pycache__"))
    script = ("import torch; from minipaged.chains import Chain, Step; from minipaged.compiled import run\n"
              "from minipaged.products import RELU, pack\nx, out = -torch.ones(1, 1), torch.zeros(1, 1)\n"
              "chain = Chain([Step(0, 1, pack(torch.ones(1, 1)), None, 1, RELU)])\nrun(chain.works(x, out))\n"
              "print(int(out))")

    def relu_of_minus_one() -> str:
        run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": str(tmp_path)})
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    assert relu_of_minus_one() == "0"
    assert list(package.rglob("chains*.nbi")), "nothing is kept"
    source = (package / "products.py").read_text(encoding="utf-8")
    assert source.count("np.float32(0) if sums[r, c] < 0") == 1
    (package / "products.py").write_text(source.replace("np.float32(0) if sums[r, c] < 0", "np.float32(7) if sums[r, c] < 0"),
                                         encoding="utf-8")
    assert relu_of_minus_one() == "7"
