"""Compiled blocks: one graph for a block's value, which is recorded, and its tangent.

PyTorch does not look at the code that carries tangents; it sees the operations that code runs, on
values and tangents, and compiles them like any others. Blocks of one build share a graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend
from torch._dynamo.exc import Unsupported
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from facm_core.jvp.rules import TangentError

Execute = Callable[..., Any]
# Its home from PyTorch 2.12 on, and before.
_opaque: Callable[[Execute], Execute] = (
    getattr(torch.compiler, "nonstrict_trace", None) or torch._dynamo.nonstrict_trace
)


def compilers(model: nn.Module) -> dict[nn.Module, Any]:
    """The network's compiled modules, and the backend of each.

    They were compiled by ``block.compile(…)`` or are inside of what ``torch.compile(block)`` gave.
    """
    callbacks: dict[nn.Module, Any] = {}
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            callbacks[module._orig_mod] = module.dynamo_ctx.callback
        elif module._compiled_call_impl is not None:
            variables = inspect.getclosurevars(module._compiled_call_impl).nonlocals
            callbacks[module] = variables["callback"]
    return {module: innermost_backend(callback) for module, callback in callbacks.items()}


def execute_compiled(
    block: nn.Module, backend: Any, execute: Execute, *args: Any, **kwargs: Any
) -> Any:
    """``execute(*args, **kwargs)``, which runs `block`, as one compiled graph."""
    leaves, structure = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    constants = [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    modules = nn.ModuleList([block, *(leaf for leaf in constants if isinstance(leaf, nn.Module))])
    build = (_Description().of([*modules, constants, vars(backend)]), structure)
    index = _BUILDS.setdefault(build, len(_BUILDS))
    if index == len(_PROGRAMS):
        _PROGRAMS.append(_Program(structure, backend))
    program = _PROGRAMS[index]
    program.execute, program.modules_used, program.constants = execute, modules, constants
    state = {**dict(modules.named_parameters()), **dict(modules.named_buffers())}
    try:
        with torch.compiler.set_stance("default"), _any_number_of_variants():
            outputs = program.compiled(index, state, tensors)
    except Unsupported as error:
        raise program.error or error from None
    return tree_unflatten(list(outputs), program.out_structure)


def _any_number_of_variants() -> AbstractContextManager[None]:
    """One program is compiled for every shape, with and without gradients."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)


class _Program(nn.Module):
    """One build as a function of its tensors alone; a block of that build fills it."""

    execute: Execute
    modules_used: nn.ModuleList
    constants: list[Any]
    out_structure: TreeSpec
    error: TangentError | None = None

    def __init__(self, structure: TreeSpec, backend: Any) -> None:
        super().__init__()
        self.structure = structure
        # A copy of the code, so that each program has only its own variants to choose from. And no
        # part of it runs uncompiled: PyTorch would go on to compile what carries tangents.
        call = FunctionType(_call.__code__.replace(), globals())
        self.compiled = torch.compile(call, backend=backend, dynamic=False, fullgraph=True)

    def forward(self, tensors: list[Tensor]) -> list[Any]:
        given = iter(tensors)
        leaves = [next(given) if constant is Tensor else constant for constant in self.constants]
        args, kwargs = tree_unflatten(leaves, self.structure)
        try:
            outputs = self.execute(*args, **kwargs)
        except TangentError as error:
            self.error = error
            raise
        results, self.out_structure = tree_flatten(outputs)
        return results


_BUILDS: dict[Hashable, int] = {}
_PROGRAMS: list[_Program] = []


@_opaque
def _run(index: int, state: dict[str, Tensor], tensors: list[Tensor]) -> list[Any]:
    program = _PROGRAMS[index]
    state = {f"modules_used.{name}": tensor for name, tensor in state.items()}
    return torch.func.functional_call(program, state, (tensors,))


def _call(index: int, state: dict[str, Tensor], tensors: list[Tensor]) -> list[Any]:
    return _run(index, state, tensors)


class _Description:
    """What decides what a module computes, besides its parameters and buffers, as a hashable."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}
        self.kept: list[Any] = []  # an id is unique as long as its object lives

    def of(self, thing: Any) -> Hashable:
        if thing is None or isinstance(
            thing, bool | int | float | str | torch.dtype | torch.device
        ):
            return (type(thing), thing)
        if id(thing) in self.seen:  # shared, or a cycle
            return ("seen", self.seen[id(thing)])
        self.seen[id(thing)] = len(self.seen)
        self.kept.append(thing)
        if isinstance(thing, tuple | list):
            return (type(thing), *(self.of(item) for item in thing))
        if isinstance(thing, dict):
            return (type(thing), *((self.of(k), self.of(v)) for k, v in thing.items()))
        if isinstance(thing, nn.Module):
            own = {
                name: value
                for name, value in vars(thing).items()
                if name not in _MODULE_INTERNALS and not name.startswith(_STATE_OF_FSDP)
            }
            children = thing._modules
            return (type(thing), self.of(own), self.of(children))
        if hasattr(thing, "__dict__") and not isinstance(thing, Tensor) and not callable(thing):
            return (type(thing), self.of(vars(thing)))
        return id(thing)


_MODULE_INTERNALS = vars(nn.Module()).keys() - {"training"} | {"forward", "_compiled_call_impl"}
_STATE_OF_FSDP = "__composable_api_state_key"
