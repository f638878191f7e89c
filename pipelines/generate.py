#!/usr/bin/env python3
# Copyright 2026 The ecvae-diffusers authors. Licensed under the Apache License, Version 2.0.
"""Generate the single-file pipelines of this folder from the package: `python pipelines/generate.py`.

`ecvae_diffusers.hub.single_file` makes them. `--check` writes nothing, and fails if one is out of date. `--cards` writes the code of
the models in `model_cards/` instead: it is not in git, and the models need it to load without the package.
"""

import argparse
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # use this checkout, even if another version is installed

from ecvae_diffusers import ECVAEPipeline  # noqa: E402
from ecvae_diffusers.hub.single_file import single_file  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    parser.add_argument("--cards", action="store_true", help="write the code of the models in model_cards/ instead")
    args = parser.parse_args()
    if args.cards:
        for index in sorted((ROOT / "model_cards").glob("*/model_index.json")):
            ECVAEPipeline.from_pretrained(index.parent).save_code(index.parent)
        return
    for name in ("ecvae", "ecvae_restoration", "ecflow"):
        path = ROOT / "pipelines" / name / "pipeline.py"
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(single_file(f"pipeline_{name}"), encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != single_file(f"pipeline_{name}"):
            sys.exit(f"{path.relative_to(ROOT)} is out of date: run `make pipelines`.")


if __name__ == "__main__":
    main()
