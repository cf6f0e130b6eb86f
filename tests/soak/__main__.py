"""`python -m tests.soak`: the bit-exact proof at any length, and the corruption runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from pathlib import Path

import torch

from tests.soak.soak import SoakReport, soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="go on from this session")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    torch.set_num_threads(1)
    report = asyncio.run(_soak(arguments))
    if arguments.format == "json":
        print(json.dumps(report.as_dict()))
    else:
        print(report.table())
    return 1 if report.different_tokens or report.different_logits else 0


async def _soak(arguments: argparse.Namespace) -> SoakReport:
    def tell(report: SoakReport) -> None:
        print(
            f"{report.seconds:6.0f} s  {arguments.first + report.sessions} sessions  "
            f"{report.num_resumes} resumes  {report.different_tokens} tokens and "
            f"{report.different_logits} rows of logits differ",
            file=sys.stderr,
            flush=True,
        )

    with tempfile.TemporaryDirectory(prefix="model1-soak-") as directory:
        return await soak(
            seed=arguments.seed,
            first=arguments.first,
            count=arguments.sessions,
            directory=Path(directory),
            progress=tell,
        )


if __name__ == "__main__":
    sys.exit(main())
