"""Options of every Ray Data set in this room."""

from __future__ import annotations

import logging

from ray.data import Dataset


def ordered_and_quiet(dataset: Dataset) -> Dataset:
    """`dataset`, giving its rows in the order of its plan, and logging only what goes wrong."""
    # Its own copy of the options: other data sets of the process keep theirs.
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    # And not one that only quotes it.
    dataset.context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    # Would warn, in each process, that progress bars are off.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return dataset
