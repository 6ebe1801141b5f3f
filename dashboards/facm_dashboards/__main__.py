"""``python -m facm_dashboards``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import uvicorn

from facm_core.errors import InvalidInputError
from facm_dashboards.app import create_app
from facm_dashboards.config import BoardConfig, check_bind
from facm_platform.tracking import TrackingConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the board until interrupted; 2 where it may not run as it is told to."""
    parser = argparse.ArgumentParser("facm_dashboards", description="Look at the runs of MLflow.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=5050, help="port to listen on (%(default)s)")
    parser.add_argument(
        "--name", action="append", default=[], help="a further host name that requests may use"
    )
    parser.add_argument(
        "--storage-uri",
        default="runs",
        help="of the runs, as in the jobs: promotions are kept below it (%(default)s)",
    )
    parser.add_argument(
        "--tracking-uri", help="MLflow (MLFLOW_TRACKING_URI, or mlflow.db below the storage)"
    )
    parser.add_argument("--experiment", default="facm", help="of MLflow (%(default)s)")
    given = parser.parse_args(argv)
    try:
        config = BoardConfig(
            host=given.host,
            port=given.port,
            names=tuple(given.name),
            storage_uri=given.storage_uri,
            tracking=TrackingConfig(uri=given.tracking_uri, experiment=given.experiment),
        )
        check_bind(config)
    except InvalidInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"board of {config.tracking_uri} at http://{config.host}:{config.port}", flush=True)
    app = create_app(config)
    app.state.data.read_ahead()
    uvicorn.run(
        app,
        host=config.host,
        port=config.port,
        log_level="warning",
        server_header=False,
        date_header=False,
        ws="none",
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
