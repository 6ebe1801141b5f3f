#!/usr/bin/env python3
"""Look into a latent set: what it holds, whether it is whole and rightly normalised, its images."""

import argparse
from functools import partial

import _paths  # noqa: F401

from facm_platform.config import report
from facm_platform.latents.benchmark import benchmark
from facm_platform.latents.contact_sheet import sample
from facm_platform.latents.inspection import inspect, stats, verify
from facm_platform.latents.published import export

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    options = {}
    for command in (inspect, verify, stats, sample, export, benchmark):
        summary = (command.__doc__ or "").splitlines()[0]
        options[command] = commands.add_parser(command.__name__, help=summary, description=summary)
        options[command].add_argument("uri", metavar="URI", help="folder or s3:// address")
        options[command].set_defaults(command=command)
    options[sample].add_argument("--rows", type=int, default=64, help="how many images (64)")
    options[sample].add_argument("--seed", type=int, default=0, help="of the order of rows (0)")
    options[sample].add_argument(
        "--output", metavar="PNG", default="latents.png", help="file or s3:// address (latents.png)"
    )
    options[export].add_argument("folder", metavar="FOLDER", help="an empty folder, or s3://")
    options[benchmark].add_argument(
        "--rows", type=int, default=100_000, help="of the set (100,000)"
    )
    options[benchmark].add_argument("--batch", type=int, default=256, help="rows a batch (256)")
    arguments = vars(parser.parse_args())
    raise SystemExit(report(partial(arguments.pop("command"), **arguments)))
