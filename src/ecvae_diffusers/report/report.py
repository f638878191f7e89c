# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Write a training run as one HTML file, which shows whether its calibration is healthy: `ecvae report my_model`.

The file needs no other file, no network and no script. Parts that a run lacks, such as calibration, evaluations or pictures,
are left out.
"""

import argparse
from pathlib import Path

from ecvae_diffusers.atomic import write_text
from ecvae_diffusers.command import ArgumentParser, local_path, printable
from ecvae_diffusers.commands import run_or_fail


# Marks reports, which may be replaced, unlike other files.
MARKER = "<!-- ecvae-diffusers training report -->"


def check_output(path: Path, is_default: bool) -> None:
    """Raise `ValueError` if `path` exists and is not a report, or if its folder does not exist."""
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
    # An argument may hold a file name that is not valid text.
    write_text(output, render(run, MARKER), errors="xmlcharrefreplace")
    print(f"Wrote {output}.")


def main(argv: list[str] | None = None, prog: str = "ecvae report") -> None:
    """Run `ecvae report` with `argv`, or with the arguments of this process."""
    printable()
    parser = ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, metavar="RUN", help="The training run's --output_dir.")
    parser.add_argument("--output", type=local_path, help="HTML file to write. Default: RUN/report.html.")
    run_or_fail(write_report, parser.parse_args(argv), prog)


if __name__ == "__main__":
    main()
