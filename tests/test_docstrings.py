"""Every public name says what it does and what it is given, and, where users begin, how it is used."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import lit_bnfold
import lit_bnfold.callbacks
import lit_bnfold.folding
import lit_bnfold.metrics
import lit_bnfold.names

# `__main__` runs when it is imported.
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(lit_bnfold.__path__, "lit_bnfold.")
    if not found.name.endswith("__main__")
]

# What others build upon. Everything else is at home here, and a sentence tells what it is.
FOR_OTHERS = ("lit_bnfold.checkpoint", "lit_bnfold.metrics", "lit_bnfold.names.")
EXPORTED = {
    id(getattr(package, name)): f"{package.__name__}.{name}"
    for package in (lit_bnfold, lit_bnfold.folding, lit_bnfold.callbacks, lit_bnfold.names)
    for name in package.__all__
    if name != "__version__"
}


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public classes and functions that a module defines, and the methods that no base class has explained."""
    for name, member in vars(module).items():
        is_own = getattr(member, "__module__", None) == module.__name__
        if name.startswith("_") or not is_own or not (inspect.isclass(member) or inspect.isfunction(member)):
            continue
        yield f"{module.__name__}.{name}", member
        for method_name, method in vars(member).items() if inspect.isclass(member) else ():
            function = getattr(method, "fget", None) or getattr(method, "__func__", method)
            is_explained = any(method_name in vars(base) for base in member.__mro__[1:])
            if inspect.isfunction(function) and not method_name.startswith("_") and not is_explained:
                yield f"{module.__name__}.{name}.{method_name}", function


def parameters(member: Any) -> set[str]:
    """What a caller passes."""
    takes_nothing_of_its_own = inspect.isclass(member) and "__init__" not in vars(member)
    if takes_nothing_of_its_own:
        return set()
    return set(inspect.signature(member).parameters) - {"self", "cls"}


def undocumented(member: Any) -> set[str]:
    """The parameters that the docstring leaves out; those of a dataclass stand there as attributes."""
    return {name for name in parameters(member) if not re.search(rf"^ +\*{{0,2}}{name}: .", member.__doc__ or "", re.M)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module: ModuleType) -> None:
    assert module.__doc__
    # The docstring of a dataclass that has none is its signature.
    lacking = [
        name for name, each in public(module) if not each.__doc__ or each.__doc__.startswith(f"{each.__name__}(")
    ]
    assert lacking == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_what_others_build_upon_documents_every_parameter(module: ModuleType) -> None:
    missing = {}
    for name, member in public(module):
        owner = vars(module)[name.removeprefix(f"{module.__name__}.").partition(".")[0]]
        if id(owner) in EXPORTED or f"{module.__name__}.".startswith(FOR_OTHERS):
            missing[name] = undocumented(member)
    assert {name: left_out for name, left_out in missing.items() if left_out} == {}


@pytest.mark.parametrize("name", sorted(set(EXPORTED.values())))
def test_what_is_exported_has_an_example_that_runs(name: str) -> None:
    """That it runs is a test of its own, since pytest collects the examples of the package."""
    package, _, member = name.rpartition(".")
    assert ">>> " in (getattr(importlib.import_module(package), member).__doc__ or "")
