"""The board: runs, searches and the registry of MLflow, to be looked at in a browser."""
