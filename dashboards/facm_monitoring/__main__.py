"""Write the dashboards' JSON."""

from __future__ import annotations

import argparse
from pathlib import Path

from facm_monitoring.panels import as_json
from facm_monitoring.training import training

DASHBOARDS = {"training.json": training}


def main() -> None:
    """Into a folder, by default that of this repository."""
    parser = argparse.ArgumentParser(prog="python -m facm_monitoring", description=__doc__)
    default = Path(__file__).resolve().parents[1] / "grafana"
    parser.add_argument("folder", nargs="?", type=Path, default=default)
    folder = parser.parse_args().folder
    for name, make in DASHBOARDS.items():
        (folder / name).write_text(as_json(make()))
        print(folder / name)


if __name__ == "__main__":
    main()
