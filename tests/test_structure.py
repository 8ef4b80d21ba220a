"""The rules that keep the package readable."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median

import pytest

import minipaged

PACKAGE = Path(minipaged.__file__).parent
CORE = ("llm", "params", "engine", "scheduler", "sequence", "sampling", "runner", "memory", "attention")
# Leaves that the core stands on: what comes in and goes out, text, the steps of samples and beams, and how the model is
# found, loaded and computed.
LEAVES = ("admission", "backends", "beam", "chains", "chaos", "compiled", "decoding", "linears", "loading", "outputs",
          "output_processor", "products", "text", "vectors")
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package ("" is the package itself) to file."""
    files = {path.relative_to(PACKAGE).with_suffix("").parts: path for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for parts, path in files.items()}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def is_part(name: str, *wholes: str) -> bool:
    """Whether a module is one of these, or lies in one of these packages."""
    return any(name == whole or name.startswith(whole + ".") for whole in wholes)


def core() -> list[str]:
    return [name for name in modules() if is_part(name, *CORE, *LEAVES)]


def imports(name: str) -> tuple[set[str], set[str]]:
    """The modules of minipaged that a module imports when it runs, and the outside packages."""
    inside, outside = set(), set()
    is_package = modules()[name].name == "__init__.py"
    here = name.split(".") if name else []
    for node in _running_code(tree(name)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level + is_package] if node.level else []
            prefix = ".".join(["minipaged", *base] if node.level else []) + ("." if node.level and node.module else "")
            module = prefix + (node.module or "")
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in found:
            if not is_part(target, "minipaged"):
                outside.add(target.split(".")[0])
                continue
            target = target.removeprefix("minipaged").removeprefix(".")
            inside.add(target if target in modules() else target.rpartition(".")[0])
    return inside - {name}, outside


def _running_code(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from _running_code(child)


def test_the_import_reader_sees_what_is_there() -> None:
    """Otherwise the rules below would hold for nothing."""
    assert {"memory.manager", "sequence", "trace", "chaos"} <= imports("scheduler")[0]
    assert "torch" in imports("memory.cache")[1] and "torch" not in imports("memory.manager")[1]
    assert {"engine", "outputs", "params", "errors"} <= imports("llm")[0] and len(core()) >= 20


@pytest.mark.parametrize("name", [name for name in modules() if is_part(name, "memory")])
def test_memory_knows_nothing_above_it(name: str) -> None:
    inside, outside = imports(name)
    assert all(is_part(other, "memory", "trace", "display", "errors") for other in inside), inside
    assert outside <= sys.stdlib_module_names | ({"torch"} if name == "memory.cache" else set())


def test_the_scheduler_knows_memory_and_sequences() -> None:
    inside, outside = imports("scheduler")
    assert all(is_part(other, "memory", "sequence", "chaos", "trace", "errors") for other in inside), inside
    assert outside <= sys.stdlib_module_names


@pytest.mark.parametrize("name", [name for name in modules() if is_part(name, "views")])
def test_views_know_the_trace_alone(name: str) -> None:
    inside, outside = imports(name)
    assert all(is_part(other, "views", "trace", "replay", "display", "errors") for other in inside), inside
    widget = name.endswith("widget") or name == "views.live"
    notebook = {"IPython", "anywidget", "ipywidgets", "traitlets"} if widget else set()
    drawing = {"resvg_py", "PIL"} if name == "views.png" else set()
    assert outside <= sys.stdlib_module_names | notebook | drawing


def test_only_the_command_line_imports_the_front_door() -> None:
    assert {name for name in modules() if "llm" in imports(name)[0]} <= {"cli", ""}


def test_imports_point_one_way() -> None:
    """No module imports, through others, itself."""
    def reached(name: str, seen: set[str]) -> set[str]:
        for other in imports(name)[0] - seen - {""}:
            seen.add(other)
            reached(other, seen)
        return seen

    # The attention package holds the contract that its backends are called by; a trace offers its own replay.
    meant = ("attention", "trace", "replay")
    assert not [name for name in modules() if name in reached(name, set()) and not is_part(name, *meant)]


def code_lines(source: str) -> int:
    """Lines with code on them: no blank lines, comments and docstrings."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = {line for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in ignored
             for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | Definition):
            lines -= set(_docstring_lines(node))
    return len(lines)


def _docstring_lines(node: ast.Module | Definition) -> range:
    if ast.get_docstring(node) is None:
        return range(0)
    return range(node.body[0].lineno, node.body[0].end_lineno + 1)


def test_the_core_is_small() -> None:
    assert code_lines('"""Doc."""\n\n# why\nx = [1,\n     2]\n') == 2
    sources = {name: modules()[name].read_text(encoding="utf-8") for name in core()}
    longest = max(sources, key=lambda name: sources[name].count("\n"))
    total, leaves = (sum(code_lines(source) for name, source in sources.items() if is_part(name, *part))
                     for part in (CORE, LEAVES))
    print(f"core {total} lines of code, leaves {leaves}, longest file {longest} of {sources[longest].count(chr(10))}")
    assert total < 1600
    assert leaves < 1080  # of which what is written in LLVM's language, the products' loop and attention's, is a fifth
    assert sources[longest].count("\n") <= 300, longest


def test_functions_are_short() -> None:
    lengths = [node.end_lineno - node.lineno + 1 - len(_docstring_lines(node))
               for name in core() for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef)]
    print(f"{len(lengths)} functions, median {median(lengths)} lines, the longest {max(lengths)}")
    assert median(lengths) <= 12


def _definitions(node: ast.AST, public: bool = True) -> Iterator[tuple[Definition, bool]]:
    """Classes, functions and methods, with whether a reader outside the module may meet them."""
    for child in getattr(node, "body", []):
        if isinstance(child, Definition):
            open_to_all = public and not child.name.startswith("_")
            yield child, open_to_all
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, open_to_all)


def _is_kernel(node: Definition) -> bool:
    """Triton and numba compile these; they read annotations as their own."""
    compilers = "triton.jit", "overload", "cfunc"
    return any(name in ast.unparse(decorator) for name in compilers for decorator in node.decorator_list)


@pytest.mark.parametrize("name", sorted(modules()))
def test_definitions_are_documented_and_typed(name: str) -> None:
    assert ast.get_docstring(tree(name)), "the module has no docstring"
    for node, public in _definitions(tree(name)):
        assert ast.get_docstring(node) or not public, f"{node.name} (line {node.lineno}) has no docstring"
        if not isinstance(node, ast.ClassDef) and not _is_kernel(node):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert node.returns is not None and not untyped, f"{node.name} (line {node.lineno}) is not typed: {untyped}"


def test_importing_is_quick_and_brings_no_torch() -> None:
    script = ("import sys, time; start = time.perf_counter(); import minipaged; "
              "print(time.perf_counter() - start, 'torch' in sys.modules)")
    seconds = []
    for _ in range(3):
        took, torch = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, check=True,
                                     capture_output=True, text=True).stdout.split()
        assert torch == "False"
        seconds.append(float(took))
    print(f"import minipaged: {min(seconds):.3f} s")
    assert min(seconds) < 0.5
