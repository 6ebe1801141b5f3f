"""infra/local/stack.py, which is no package's module."""

import importlib.util
import sys
from pathlib import Path

_FILE = Path(__file__).resolve().parents[2] / "infra" / "local" / "stack.py"
_SPEC = importlib.util.spec_from_file_location("facm_local_stack", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = _MODULE
_SPEC.loader.exec_module(_MODULE)

Ports, Stack, status = _MODULE.Ports, _MODULE.Stack, _MODULE.status
