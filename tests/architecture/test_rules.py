"""The rules of the architecture, each a failing test.

A rule is a function from a repository to its findings. Every rule must hold here (`test_holds`),
must object to each violating sample and must let the harmless ones pass (`test_judges`), so that
none of them can be vacuous.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORE = "facm_core"
PLATFORM = "platform/facm_platform"
DASHBOARDS = "dashboards/facm_dashboards"

CORE_IMPORTS = {"facm_core", "torch", "numpy", "safetensors"}
CORE_MAY_IMPORT = {"diffusers", "ftfy", "transformers", "triton"}
NOT_IN_CORE = {
    "ray",
    "mlflow",
    "boto3",
    "pyarrow",
    "omegaconf",
    "facm_platform",
    "jobs",
    "dashboards",
    "facm_dashboards",
}
ABOVE_PLATFORM = {"jobs", "dashboards", "facm_dashboards"}
UNPICKLERS = {
    f"{module}.{name}"
    for module in ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "ray.cloudpickle")
    for name in ("load", "loads", "Unpickler")
} | {"pandas.read_pickle"}
TOP_LEVEL = {
    "platform",
    "jobs",
    "facm_core",
    "dashboards",
    "tests",
    "infra",
    "pyproject.toml",
    "README.md",
    "Makefile",
    "LICENSE",
    "requirements.lock",
}


# --- what the rules read ------------------------------------------------------------------------


def git(root: Path, *arguments: str) -> str:
    # A git hook's variables point at the repository being committed to, which is not always root.
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_INDEX_FILE")}
    return subprocess.run(
        ["git", *arguments], cwd=root, env=env, check=True, capture_output=True, text=True
    ).stdout


def python_sources(root: Path, *folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            yield file.relative_to(root).as_posix(), ast.parse(file.read_bytes(), str(file))


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, absolute module) of every import, wherever it stands, `import_module("x")` too."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), level=0):
                yield node.lineno, module
            case ast.Call(
                func=ast.Attribute(attr="import_module")
                | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield node.lineno, module


def local_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> the dotted name that an import bound it to."""
    bound = {}
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                bound |= {alias.asname: alias.name for alias in names if alias.asname}
            case ast.ImportFrom(module=str(module), level=0, names=names):
                bound |= {a.asname or a.name: f"{module}.{a.name}" for a in names}
    return bound


def dotted_name(node: ast.expr, bound: dict[str, str]) -> str:
    match node:
        case ast.Name(id=name):
            return bound.get(name, name)
        case ast.Attribute(value=value, attr=attr):
            return f"{dotted_name(value, bound)}.{attr}"
    return ""


# --- the rules ----------------------------------------------------------------------------------


def forbidden_imports(root: Path, folder: str, forbidden: Callable[[str], bool]) -> list[str]:
    return [
        f"{file}:{line} imports {module}"
        for file, tree in python_sources(root, folder)
        for line, module in imports(tree)
        if forbidden(module.partition(".")[0])
    ]


def core_imports_only_pytorch(root: Path) -> list[str]:
    allowed = CORE_IMPORTS | CORE_MAY_IMPORT | sys.stdlib_module_names
    return forbidden_imports(root, CORE, lambda package: package not in allowed)


def platform_imports_nothing_above_it(root: Path) -> list[str]:
    return forbidden_imports(root, PLATFORM, lambda package: package in ABOVE_PLATFORM)


IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
root, blocked, optional = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, root)
sys.modules.update(dict.fromkeys(blocked + optional))
package = importlib.import_module("facm_core")
for module in pkgutil.walk_packages(package.__path__, "facm_core."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if module.ispkg or error.name.partition('.')[0] not in optional:
            raise
"""


def core_runs_on_its_own(root: Path) -> list[str]:
    """What no parser sees: imports by computed names, and those of the packages it imports.

    Without the optional packages only a module that no package imports may be missing.
    """
    names = (json.dumps(sorted(names)) for names in (NOT_IN_CORE, CORE_MAY_IMPORT))
    argv = [sys.executable, "-c", IMPORT_EVERYTHING, str(root), *names]
    done = subprocess.run(argv, cwd="/", capture_output=True, text=True, timeout=120)
    return [] if done.returncode == 0 else done.stderr.strip().splitlines()[-1:]


def every_folder_of_modules_is_a_package(root: Path) -> list[str]:
    """One without `__init__.py` would be left out of the wheel, and unseen by the rule above."""
    folders = {
        file.parent for name in (CORE, PLATFORM, DASHBOARDS) for file in (root / name).rglob("*.py")
    }
    return sorted(str(f.relative_to(root)) for f in folders if not (f / "__init__.py").exists())


def platform_is_no_package(root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in (root / "platform").glob("__init__.*")]


def platform_module_is_the_standard_library(root: Path) -> list[str]:
    """Asks the import system itself, so that an earlier `import platform` hides nothing."""
    spec = PathFinder.find_spec("platform", [str(root), str(root / "platform"), *sys.path])
    origin = str(spec and spec.origin)
    return [] if is_standard_platform(origin) else [os.path.relpath(origin, root)]


def is_standard_platform(origin: str) -> bool:
    return Path(origin).resolve() == Path(sysconfig.get_path("stdlib"), "platform.py").resolve()


def nothing_is_unpickled(root: Path) -> list[str]:
    found = []
    for file, tree in python_sources(root, CORE, "platform", "jobs", "dashboards", "infra"):
        bound = local_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (why := unpickles(node, bound)):
                found.append(f"{file}:{node.lineno} {why}")
    return found


def unpickles(call: ast.Call, bound: dict[str, str]) -> str | None:
    """Only a literal counts as safe: what a variable holds is not known here."""
    name = dotted_name(call.func, bound)
    given = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    named = {k.arg for k in call.keywords}
    if name in UNPICKLERS:
        return name
    if "allow_pickle" in named and given.get("allow_pickle") is not False:
        return "allow_pickle"
    if (name == "torch.load" or "weights_only" in named) and given.get("weights_only") is not True:
        return f"{name} without weights_only=True"
    return None


def lock_carries_no_address(root: Path) -> list[str]:
    address = re.compile(
        r"\w://|\bfile:|\s@\s|(^|\s)(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)\b"
    )
    lines = (root / "requirements.lock").read_text().splitlines()
    return [f"requirements.lock:{n}" for n, line in enumerate(lines, 1) if address.search(line)]


def jobs_are_executable(root: Path) -> list[str]:
    """On disk and in git: `ray job submit` runs the file with the mode it was checked out with."""
    staged = dict(
        line.split("\t")[::-1] for line in git(root, "ls-files", "--stage", "jobs").splitlines()
    )
    return [
        f"jobs/{file.name}"
        for file in sorted((root / "jobs").glob("*.py"))
        if file.read_bytes().startswith(b"#!")
        and not (
            file.stat().st_mode & 0o100
            and staged.get(f"jobs/{file.name}", "100755").startswith("100755")
        )
    ]


def top_level_is_fixed(root: Path) -> list[str]:
    """Files not yet added count; ignored ones do not."""
    files = git(root, "ls-files", "--cached", "--others", "--exclude-standard")
    entries = {name.partition("/")[0] for name in files.splitlines()}
    return sorted(e for e in entries if not e.startswith(".") and e not in TOP_LEVEL)


# --- the tests ----------------------------------------------------------------------------------

Rule = Callable[[Path], list[str]]
Files = dict[str, str]

# rule, a small repository, what the rule finds in it
SAMPLES: list[tuple[Rule, Files, list[str]]] = [
    (
        core_imports_only_pytorch,
        {"facm_core/a.py": "import ray.data"},
        ["facm_core/a.py:1 imports ray.data"],
    ),
    (
        core_imports_only_pytorch,
        {"facm_core/b/c.py": "def f():\n    from pyarrow import parquet"},
        ["facm_core/b/c.py:2 imports pyarrow"],
    ),
    (
        core_imports_only_pytorch,
        {"facm_core/a.py": "import importlib\nimportlib.import_module('mlflow')"},
        ["facm_core/a.py:2 imports mlflow"],
    ),
    (
        core_imports_only_pytorch,
        {"facm_core/a.py": "import torch, raytrace"},
        ["facm_core/a.py:1 imports raytrace"],
    ),
    (
        core_imports_only_pytorch,
        {"facm_core/a.py": "import json, torch.nn, triton.language\nfrom . import ray"},
        [],
    ),
    (
        core_runs_on_its_own,
        {"facm_core/__init__.py": "", "facm_core/a.py": "__import__('r' + 'ay')"},
        ["ModuleNotFoundError: import of ray halted; None in sys.modules"],
    ),
    (
        core_runs_on_its_own,
        {"facm_core/__init__.py": "from facm_core import a", "facm_core/a.py": "import diffusers"},
        ["ModuleNotFoundError: import of diffusers halted; None in sys.modules"],
    ),
    (
        core_runs_on_its_own,
        {"facm_core/__init__.py": "", "facm_core/a.py": "import triton.language"},
        [],
    ),
    (
        platform_imports_nothing_above_it,
        {"platform/facm_platform/a.py": "from jobs.distill import main\nimport dashboards"},
        [
            "platform/facm_platform/a.py:1 imports jobs.distill",
            "platform/facm_platform/a.py:2 imports dashboards",
        ],
    ),
    (
        platform_imports_nothing_above_it,
        {"platform/facm_platform/a.py": "import ray\nfrom facm_platform import jobs"},
        [],
    ),
    (
        every_folder_of_modules_is_a_package,
        {"facm_core/__init__.py": "", "facm_core/b/c.py": "", "facm_core/recipes/d.yaml": ""},
        ["facm_core/b"],
    ),
    (platform_is_no_package, {"platform/__init__.py": ""}, ["platform/__init__.py"]),
    (
        platform_module_is_the_standard_library,
        {"platform/__init__.py": "", "platform/facm_platform/__init__.py": ""},
        ["platform/__init__.py"],
    ),
    (
        platform_module_is_the_standard_library,
        {"platform/platform.py": ""},
        ["platform/platform.py"],
    ),
    (
        nothing_is_unpickled,
        {"facm_core/a.py": "import pickle\npickle.loads(b)"},
        ["facm_core/a.py:2 pickle.loads"],
    ),
    (
        nothing_is_unpickled,
        {"jobs/a.py": "from pickle import load as l\nl(f)"},
        ["jobs/a.py:2 pickle.load"],
    ),
    (
        nothing_is_unpickled,
        {"jobs/a.py": "import torch as t\nt.load(f)\nt.load(f, weights_only=flag)"},
        [
            "jobs/a.py:2 torch.load without weights_only=True",
            "jobs/a.py:3 torch.load without weights_only=True",
        ],
    ),
    (
        nothing_is_unpickled,
        {"facm_core/a.py": "import numpy as np\nnp.load(f, allow_pickle=True)"},
        ["facm_core/a.py:2 allow_pickle"],
    ),
    (
        nothing_is_unpickled,
        {"dashboards/a.py": "load(f, weights_only=False)"},
        ["dashboards/a.py:1 load without weights_only=True"],
    ),
    (
        nothing_is_unpickled,
        {
            "facm_core/a.py": "torch.load(f, weights_only=True)\njson.load(f)",
            "jobs/a.py": "np.load(f, allow_pickle=False)",
        },
        [],
    ),
    (
        lock_carries_no_address,
        {"requirements.lock": "--index-url x\na==1\nb @ c\n# https://d\ne==1 --find-links f"},
        [f"requirements.lock:{line}" for line in (1, 3, 4, 5)],
    ),
    (
        lock_carries_no_address,
        {"requirements.lock": "a-f==1 ; x < '3' \\\n    --hash=sha256:0\n"},
        [],
    ),
    (
        jobs_are_executable,
        {"jobs/a.py": "#!/usr/bin/env python\n", "jobs/_b.py": ""},
        ["jobs/a.py"],
    ),
    (
        top_level_is_fixed,
        {"scripts/a.py": "", "setup.py": "", ".ci/run": "", "jobs/a.py": ""},
        ["scripts", "setup.py"],
    ),
]

RULES = list(dict.fromkeys([rule for rule, _, _ in SAMPLES]))


def repository(root: Path, files: Files) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    git(root, "init", "--quiet")
    git(root, "add", "--all")
    return root


@pytest.mark.parametrize("rule", RULES)
def test_holds(rule: Rule) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "files", "findings"), SAMPLES)
def test_judges(rule: Rule, files: Files, findings: list[str], tmp_path: Path) -> None:
    assert rule(repository(tmp_path, files)) == findings


def test_every_rule_has_a_violating_sample() -> None:
    assert {rule for rule, _, findings in SAMPLES if findings} == set(RULES)


def test_a_job_must_be_executable_in_git_too(tmp_path: Path) -> None:
    repository(tmp_path, {"jobs/a.py": "#!/usr/bin/env python"})
    (tmp_path / "jobs/a.py").chmod(0o755)
    assert jobs_are_executable(tmp_path) == ["jobs/a.py"]
    git(tmp_path, "add", "--all")
    assert jobs_are_executable(tmp_path) == []


ORIGINS_IN_A_WORKER = """
import importlib.util, json, sys
import ray

def origins(names):
    return {name: getattr(importlib.util.find_spec(name), "origin", None) for name in names}

found = []
for runtime_env in json.loads(sys.argv[1]):
    ray.init(address="local", num_cpus=1, include_dashboard=False, runtime_env=runtime_env)
    found.append(ray.get(ray.remote(origins).remote(["platform", "facm_core", "facm_platform"])))
    ray.shutdown()
print(json.dumps(found))
"""


def test_ray_workers_import_the_standard_platform_and_our_packages(tmp_path: Path) -> None:
    """Shipped as the jobs ship themselves: the repository as working directory, both packages as
    modules. A second cluster gets a real `platform` package, to see that this would be noticed."""
    ours = {"working_dir": str(ROOT), "py_modules": [str(ROOT / CORE), str(ROOT / PLATFORM)]}
    # A copy of the module itself: the worker has to survive what shadows its standard library.
    (tmp_path / "platform").mkdir()
    shutil.copy(
        Path(sysconfig.get_path("stdlib"), "platform.py"), tmp_path / "platform/__init__.py"
    )
    shadowed = {"working_dir": str(tmp_path)}

    argv = [sys.executable, "-c", ORIGINS_IN_A_WORKER, json.dumps([ours, shadowed])]
    done = subprocess.run(argv, cwd="/", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    good, bad = json.loads(done.stdout.splitlines()[-1])

    assert is_standard_platform(good["platform"])
    for package in ("facm_core", "facm_platform"):
        assert good[package] is not None
        assert not Path(good[package]).is_relative_to(ROOT), f"{package} was not shipped"
    assert bad["platform"].endswith("platform/__init__.py")
    assert not is_standard_platform(bad["platform"])
