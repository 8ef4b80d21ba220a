"""The `minipaged` command. Each subcommand is a function of its parsed arguments that returns the exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

from .errors import InvalidConfig, MinipagedError, TraceError
from .params import SamplingParams
from .trace import Trace

CHECKOUT = Path(__file__).resolve().parent.parent
FAILED, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


class NoNotebooks(MinipagedError, FileNotFoundError):
    """The notebooks are not where the package was installed from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Parameters
    ----------
    argv : sequence of str or None
        The arguments after the command's name; None: those of this process.

    Returns
    -------
    int
        0, or 2 after a named error, 130 after Ctrl-C, 141 if the reader of the output went away.
    """
    parser = _parser()
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.run is not lab:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        return args.run(args)
    except MinipagedError as error:
        print(f"minipaged: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered has nowhere to go; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minipaged", description="PagedAttention, to be read and run.")
    commands = parser.add_subparsers(metavar="command", required=True)

    command = commands.add_parser("lab", help="open JupyterLab at the first notebook", allow_abbrev=False,
                                  epilog="Other options go to JupyterLab, for example --port 9000.")
    command.set_defaults(run=lab)

    command = commands.add_parser("generate", help="continue a text, then show its block table")
    command.set_defaults(run=generate)
    command.add_argument("prompt", help="the text to continue")
    command.add_argument("--model", default="tiny-opt", help="tiny-opt, a folder, or a Hugging Face name")
    command.add_argument("--block-size", type=int, default=4,
                         help="tokens per KV block (default: 4, as in the paper's Figure 6)")
    command.add_argument("--trace", type=Path, metavar="FILE", help="write what happens to memory, as JSON Lines")
    command.add_argument("--max-tokens", type=int, default=32, help="tokens to generate at most (default: 32)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest token")
    command.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this share")
    command.add_argument("--top-k", type=int, default=0, help="sample among so many likeliest tokens; 0: all")
    command.add_argument("--seed", type=int, help="makes sampling repeatable")

    command = commands.add_parser("view", help="write the microscope over a trace as one HTML file")
    command.set_defaults(run=view)
    command.add_argument("trace", type=Path, metavar="TRACE.jsonl", help="a file that generate --trace wrote")
    command.add_argument("other", type=Path, metavar="TRACE2.jsonl", nargs="?",
                         help="a second trace: both are shown side by side, and where they part")
    command.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the trace's name with .html")
    command.add_argument("--step", type=int, help="the iteration to open at (default: the last that used a block)")

    command = commands.add_parser("bench", help="tokens per second on 32 requests of random lengths")
    command.set_defaults(run=bench)
    command.add_argument("--model", default="opt-125m",
                         help="default: random weights in the geometry of opt-125m; else as in generate")
    command.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    command.add_argument("--pool", choices=["full", "quarter"], help="KV blocks for all requests at their full length, "
                         "or a quarter of them; default: both, one after the other")
    command.add_argument("--against", choices=["transformers"], help="run its generate and its continuous batching too")
    command.add_argument("--rounds", type=_count, default=3, metavar="N", help="runs of each (default: 3)")
    command.add_argument("--requests", type=_count, default=32, metavar="N", help="default: 32")
    command.add_argument("--gpu", action="store_true", help="instead of these: Figures 18 and 19a on this GPU, kernel "
                         "by kernel, in OPT-13B's shape; takes no other option")

    command = commands.add_parser("kernels", help="what the compiler makes of the Triton kernels; needs no GPU")
    command.set_defaults(run=kernels)
    command.add_argument("--report", action="store_true", required=True,
                         help="compile them for A100, H100 and MI300X, and list registers, spills and load widths")

    command = commands.add_parser("reproduce", help="the paper's tables and figures, made again beside its own numbers")
    command.set_defaults(run=reproduce)
    command.add_argument("figures", nargs="+", metavar="NAME", help="such as fig2, table1, or all")
    command.add_argument("--out", type=Path, default=Path("figures"), metavar="FOLDER", help="default: figures")
    command.add_argument("--minutes", type=float, default=60.0,
                         help="simulated minutes of arrivals behind each point (default: 60, as in the paper)")
    return parser


def lab(args: argparse.Namespace) -> int:
    """Serve JupyterLab until it is stopped."""
    options = lab_options(CHECKOUT, args.rest)
    os.environ.setdefault("MINIPAGED_AUDIT", "1")  # the kernels inherit it: in a notebook a fault shall show at once
    from jupyterlab.labapp import LabApp  # takes a second; no other subcommand needs it

    LabApp.launch_instance(options)
    return 0


def lab_options(checkout: Path, rest: Sequence[str]) -> list[str]:
    """What to start JupyterLab with, here: as root or not, with a screen or without.

    Parameters
    ----------
    checkout : Path
        The folder that holds ``notebooks/``.
    rest : sequence of str
        The user's own options; they come last and so prevail.

    Raises
    ------
    NoNotebooks
        ``checkout`` has no notebook 01.
    """
    first = next((checkout / "notebooks").glob("01_*.ipynb"), None)
    if first is None:
        raise NoNotebooks(f"there is no notebook 01_*.ipynb in {checkout / 'notebooks'}; clone the repository and "
                          "install it from there with: pip install -e .")
    # The first page, not a file to open: only this is part of the address that is printed without a browser.
    options = [f"--ServerApp.root_dir={checkout}", f"--LabApp.default_url=/lab/tree/notebooks/{first.name}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        options.append("--allow-root")
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        options.append("--no-browser")
    return [*options, *rest]


def generate(args: argparse.Namespace) -> int:
    """Print the text token by token, then the block table that its keys and values lay in."""
    params = SamplingParams(temperature=args.temperature, top_p=args.top_p, top_k=args.top_k,
                            max_tokens=args.max_tokens, seed=args.seed)
    with closing(_trace(args.trace)) as trace:
        from minipaged import LLM  # brings torch along

        with LLM(args.model, trace=trace, block_size=args.block_size) as llm:
            print(args.prompt, end="", flush=True)
            shown = 0
            for output in llm.stream(args.prompt, params):
                print(output.outputs[0].text[shown:], end="", flush=True)
                shown = len(output.outputs[0].text)
            print(f"\n\n{output.block_tables[0]}")
    return 0


def view(args: argparse.Namespace) -> int:
    """Write a recorded trace as one file that any browser opens from the disk."""
    from .views import compare, html

    output = args.output or args.trace.with_suffix(".html")
    try:
        if args.other is None:
            html.save(args.trace, output, args.step)
        else:
            files = args.trace, args.other
            compare.save(tuple(map(html.events_of, files)), [file.stem for file in files], output, args.step)
    except OSError as error:
        raise TraceError(f"{error}; name a trace that you may read and a file that you may write") from error
    print(output)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Print how fast the engine serves the benchmark's requests."""
    if args.gpu:
        from .bench.gpu import gpu_bench

        print(gpu_bench())
        return 0
    from .bench import SHARES, bench as run

    print(run(args.model, args.dtype, [args.pool] if args.pool else list(SHARES), args.against is not None,
              args.rounds, args.requests))
    return 0


def kernels(args: argparse.Namespace) -> int:
    """Print the report on the compiled kernels."""
    if find_spec("triton") is None:
        raise InvalidConfig("Triton is not to be had on this platform; the report needs its compiler, on Linux")
    from .kernel_report import report

    print(report())
    return 0


def reproduce(args: argparse.Namespace) -> int:
    """Write the figures that are named, with what they are made of, and print ours beside the paper's."""
    from .reproduce import reproduce as make

    make(args.figures, args.out, args.minutes)
    return 0


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)


def _trace(path: Path | None) -> Trace:
    try:
        return Trace(path)
    except OSError as error:
        raise TraceError(f"cannot write the trace: {error}; name a file in a folder that you may write to") from error


if __name__ == "__main__":
    sys.exit(main())
