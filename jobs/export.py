#!/usr/bin/env python3
"""Make a model artefact of a checkpoint, from any average of its weights."""

import argparse
from functools import partial

import _paths  # noqa: F401

from facm_platform.config import report
from facm_platform.training.export import export

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder checkpoint_... of a run")
    parser.add_argument("output", metavar="OUTPUT", help="an empty folder, or s3://")
    parser.add_argument(
        "--sigma-rel", type=float, help="width of the average, tracked or not (the run's own)"
    )
    raise SystemExit(report(partial(export, **vars(parser.parse_args()))))
