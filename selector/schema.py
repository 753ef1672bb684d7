"""How a module is written down and built again: ``class_path`` and ``init_args``, the schema of LightningCLI.

    {"class_path": "selector.methods.svd_prune.SVDPrune", "init_args": {"energy": 0.9}}

Checkpoints, records and YAML all use it. A class that is not the package's own is imported only with permission.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import nn

Built = TypeVar("Built", bound=nn.Module)


def class_path(cls: type) -> str:
    """Where a class is found: its module and its name, with dots.

    >>> from selector.budget import Budget
    >>> class_path(Budget)
    'selector.budget.Budget'
    """
    return f"{cls.__module__}.{cls.__qualname__}"


def init_args(module: nn.Module) -> dict[str, Any]:
    """Constructor arguments, read back from the attributes of the same names; a module as its class_path.

    Raises:
        TypeError: an argument that is not kept under its own name, or a constructor with ``*args`` or ``**kwargs``.
    """
    name, read = type(module).__name__, {}
    if type(module).__init__ is nn.Module.__init__:  # a class without arguments; nn.Module's own are none of its
        return read

    for parameter in inspect.signature(type(module)).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{name} must name its arguments one by one, got {parameter}")

        # Not AttributeError: nn.Module would take it for "no attribute init_args" and hide which one is missing.
        if not hasattr(module, parameter.name):
            raise TypeError(f"{name} must keep argument {parameter.name!r} as self.{parameter.name}")
        read[parameter.name] = _plain(getattr(module, parameter.name))
    return read


def describe(module: nn.Module) -> dict[str, Any]:
    """The mapping from which `build` makes the module again, all but its weights."""
    return {"class_path": class_path(type(module)), "init_args": init_args(module)}


def build(
    path: str,
    arguments: Mapping[str, Any],
    root: type[Built],
    allow: Iterable[str] = (),
    check: Callable[[type[Built], str], None] | None = None,
) -> Built:
    """An object of a class, and of those that its arguments describe.

    Args:
        path: the class, see `class_path`.
        arguments: of its constructor; a mapping with a class_path becomes an object.
        root: the class that it must inherit from.
        allow: packages beside ``selector`` whose classes may be named; one already defined needs no permission.
        check: called with every class and how it was named, before it is built; raises what forbids it.

    Raises:
        ValueError: a class that is unknown, not allowed or no `root`; an argument that it lacks, or of a wrong type.
    """
    cls = imported(path, root, allow)
    if check is not None:
        check(cls, path)

    # Inner objects first: the outer constructor gets objects, and its own checks see them.
    made = {
        name: build(str(value["class_path"]), dict(value.get("init_args") or {}), root, allow, check)
        if isinstance(value, Mapping) and "class_path" in value
        else value
        for name, value in arguments.items()
    }
    return construct(cls, made)


def imported(path: str, root: type[Built], allow: Iterable[str] = ()) -> type[Built]:
    """The class of a class_path; the arguments are those of `build`.

    Raises:
        ValueError: a class that is unknown, not allowed or no `root`.
    """
    # A class that is already defined runs no code by being named, wherever it is from (a notebook's is in __main__).
    for known in _subclasses(root):
        if class_path(known) == path:
            return known

    module, _, name = path.rpartition(".")
    trusted = ("selector", *allow)
    if not any(module == package or module.startswith(package + ".") for package in trusted):
        raise ValueError(
            f"class_path {path!r} is not from {' or '.join(trusted)}: import its module, or allow its package"
        )

    # Importing a module runs it: only now, with permission.
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"class_path {path!r} cannot be imported: {error}") from error
    if not (inspect.isclass(cls) and issubclass(cls, root)):
        raise ValueError(f"class_path {path!r} is not a {root.__name__}")
    return cls


def construct(cls: type[Built], arguments: Mapping[str, Any]) -> Built:
    """An object of a class, its arguments checked against the signature first.

    Raises:
        ValueError: an argument that is missing, unknown or of a wrong type, by name; or the constructor's own.
    """
    # The constructor may raise TypeErrors of its own; those of a wrong call are told apart by binding first.
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"init_args of {cls.__name__}: {error}; it takes {signature}") from error
    for name in arguments.keys() & signature.parameters.keys():
        _check_plain(cls, name, signature.parameters[name].annotation, arguments[name])
    return cls(**arguments)


def _check_plain(cls: type, argument: str, annotation: Any, value: Any) -> None:
    """Refuses a value of the wrong type where a number, a truth value or a text is asked for: no "maybe" for a bool."""
    # A text under `from __future__ import annotations`, else a type or a union of types.
    annotation = getattr(annotation, "__name__", str(annotation))
    wanted = set(annotation.split(" | "))
    if not wanted <= {"bool", "int", "float", "str", "None"}:
        return  # the class itself knows

    # By exact type: a bool is an int to Python, and no number to us. An int does for a float.
    given = "None" if value is None else type(value).__name__
    if given not in wanted and not (given == "int" and "float" in wanted):
        raise ValueError(f"init_args of {cls.__name__}: {argument} must be {annotation}, got {value!r}")


def _plain(value: Any) -> Any:
    """A value as JSON holds it: tuples as lists, modules as their description."""
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return describe(value) if isinstance(value, nn.Module) else value


def _subclasses(cls: type[Built]) -> Iterator[type[Built]]:
    """All classes below this one, at any depth."""
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
