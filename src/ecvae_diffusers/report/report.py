# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Lay a training run out as one HTML file, to see whether its calibration is healthy: `ecvae report my_model`.

The file needs nothing besides itself, neither the network nor a script. What a run lacks (calibration, evaluations,
pictures) is left out.
"""

import argparse
from pathlib import Path

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.command import ArgumentParser, local_path, printable
from ecvae_diffusers.commands import run_or_fail


# Tells a report of ours, which may be replaced, from other files.
MARKER = "<!-- ecvae-diffusers training report -->"


def check_output(path: Path, is_default: bool) -> None:
    """Raise `ValueError` if there is something else than a report, or no folder for one."""
    if not path.parent.is_dir():
        raise ValueError(f"--output {str(path)!r} can't be written: there is no folder {str(path.parent)!r}.")
    if path.is_dir() or path.exists() and not is_default and MARKER.encode() not in path.read_bytes()[:1000]:
        raise ValueError(f"--output {str(path)!r} exists and is not a report: choose another name.")


def write_report(args: argparse.Namespace) -> None:
    from ecvae_diffusers.report.page import render
    from ecvae_diffusers.report.read import Run

    output = args.output or args.run / "report.html"
    run = Run.read(args.run)
    check_output(output, is_default=args.output is None)
    # An argument may hold a file name that is no text.
    write_text(output, render(run, MARKER), errors="xmlcharrefreplace")
    print(f"Wrote {output}.")


def main(argv: list[str] | None = None, prog: str = "ecvae report") -> None:
    """Write a report as a command line says: that of this process, or `argv`."""
    printable()
    parser = ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN", help="The training run's --output_dir.")
    parser.add_argument("--output", type=local_path, help="The HTML file to write. RUN/report.html if not given.")
    run_or_fail(write_report, parser.parse_args(argv), prog)


if __name__ == "__main__":
    main()
