"""Names and specs of selectors.

A file under ``selector/methods`` is its own registration: ``svd_prune.py`` defines the one selector named
``svd-prune``. Everywhere (command line, YAML, checkpoints) a selector is written in one of these forms:

    svd-prune                                   a name
    svd-prune:energy=0.5,center=false           a name with arguments
    svd-prune:rank=32,merge=nearest             any of these, and dropped tokens flow into kept ones
    lofi:layer=2,count=after                    any of these, at a layer inside the language model
    mix:a=svd-prune,b=(norm:largest=false)      a selector made of others; parentheses around arguments of their own
    checkpoints/my-selector                     a checkpoint folder
    hf:owner/name                               a checkpoint on the Hugging Face hub
    hf:owner/name@revision                      the same at a commit, branch or tag
    {class_path: ..., init_args: {...}}         the schema of LightningCLI and of config.json
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from selector import methods, schema
from selector.base import TokenSelector

WRAPPERS = frozenset({"merge", "layer", "count"})
"""Arguments of a spec that put a selector around another, where the class has no argument of that name."""


def available_selectors() -> dict[str, type[TokenSelector]]:
    """Every shipped selector class by its short name.

    >>> available_selectors()["svd-prune"].__name__
    'SVDPrune'
    """
    return {name: _class_of(name) for name in _names()}


def load_selector(spec: str | Path | Mapping[str, Any] | TokenSelector, allow: Iterable[str] = ()) -> TokenSelector:
    """A selector from any of the forms above, or the object itself.

    Args:
        spec: see the module.
        allow: packages beside ``selector`` whose classes a spec or a checkpoint may name. A selector class that is
            already defined in this process needs no permission.

    Raises:
        ValueError: unknown name (with the closest ones), wrong argument, or a learned selector without a checkpoint.

    Example:
        >>> load_selector("norm:largest=false")
        Norm(largest=False)
    """
    # Objects, and the schema of config.json.
    if isinstance(spec, TokenSelector):
        return spec
    if isinstance(spec, Mapping):
        if not isinstance(spec.get("init_args") or {}, Mapping):
            raise ValueError(f"init_args must be a mapping, got {spec['init_args']!r}")
        return _built(spec, allow)
    if not isinstance(spec, (str, Path)) or not str(spec):
        raise ValueError(f"selector must be a name, a folder or a mapping, got {spec!r}")

    # A checkpoint: a folder whose name may hold a colon, then the hub, then a folder with `merge` behind a colon. A
    # shipped name wins over a folder of that name, so that a spec means the same in every working directory.
    if isinstance(spec, Path) or (Path(spec).is_dir() and spec not in _names()):
        return TokenSelector.from_pretrained(spec, allow=allow)
    name, _, arguments = spec.partition(":")
    if name == "hf":
        repository, at, revision = arguments.partition("@")
        if not repository or (at and not revision):
            raise ValueError(f"selector {spec!r} must go on with owner/name, or owner/name@revision, of the hub")
        return TokenSelector.from_pretrained(repository, allow=allow, revision=revision or None)
    if name and Path(name).is_dir() and name not in _names():
        given = _arguments(spec, arguments)
        if set(given) - WRAPPERS:
            raise ValueError(
                f"selector {spec!r}: a checkpoint has its arguments, it takes merge=nearest and layer alone"
            )
        return _wrapped(TokenSelector.from_pretrained(name, allow=allow), given)

    # A shipped name, or an error with the closest ones.
    if name not in _names():
        if "/" in spec:
            raise ValueError(f"no selector checkpoint at {spec!r}: the folder does not exist")
        close = difflib.get_close_matches(name, _names(), n=3, cutoff=0.4)
        hint = f" (did you mean {', '.join(close)}?)" if close else ""  # in front: the list is long, and may be cut off
        raise ValueError(f"unknown selector {name!r}{hint}: not one of {', '.join(_names())}, nor a checkpoint folder")

    cls = _class_of(name)
    _refuse_untrained(cls, name)
    return _construct(cls, _arguments(spec, arguments), allow)


def _built(spec: Mapping[str, Any], allow: Iterable[str]) -> TokenSelector:
    """From ``class_path`` and ``init_args``; ``merge`` may stand among them, at every level."""
    # Not `schema.build`: parts may be specs in a text, and `merge` is an argument of no constructor.
    arguments = {
        name: _built(value, allow) if isinstance(value, Mapping) and "class_path" in value else value
        for name, value in dict(spec.get("init_args") or {}).items()
    }
    cls = schema.imported(str(spec.get("class_path", "")), TokenSelector, allow)
    _refuse_untrained(cls, str(spec.get("class_path", "")))
    return _construct(cls, arguments, allow)


def _refuse_untrained(cls: type[TokenSelector], name: str) -> None:
    """Raises a ValueError for a learned class: only a checkpoint has its weights."""
    if cls.learned:
        raise ValueError(f"selector {name!r} is learned: name a checkpoint folder, since it needs trained weights")


def _construct(cls: type[TokenSelector], arguments: Mapping[str, Any], allow: Iterable[str]) -> TokenSelector:
    """A selector from arguments in which other selectors may still be specs, and some may wrap the whole."""
    parameters = inspect.signature(cls).parameters

    # Taken out where the class itself has no argument of that name, as HiPrune has its `layer`.
    given = dict(arguments)
    around = {name: given.pop(name) for name in WRAPPERS & given.keys() - parameters.keys()}
    for name in given.keys() & parameters.keys():
        # Annotations are texts here: every module of selectors postpones their evaluation.
        if parameters[name].annotation == "TokenSelector":
            given[name] = load_selector(given[name], allow)
    if "count" in around and "layer" not in around:  # without a layer it is a mistake that the class itself names
        given["count"] = around.pop("count")
    return _wrapped(schema.construct(cls, given), around)


def _wrapped(selector: TokenSelector, around: Mapping[str, Any]) -> TokenSelector:
    """The selector itself, or so that dropped tokens flow into kept ones, or that it acts at a layer."""
    if around.get("merge") is not None:
        selector = _class_of("merge")(selector, around["merge"])
    if "count" in around and "layer" not in around:
        raise ValueError("count says what is counted inside the language model: it goes with layer")
    if "layer" in around:
        place = {name: around[name] for name in ("layer", "count") if name in around}
        selector = _class_of("inside")(selector, **place)
    return selector


def _names() -> list[str]:
    """Short names of the files in ``selector/methods``, without importing them."""
    return sorted(info.name.replace("_", "-") for info in pkgutil.iter_modules(methods.__path__))


def _class_of(name: str) -> type[TokenSelector]:
    """The one public selector class that a file defines; what it imports from others does not count."""
    module = importlib.import_module(f"selector.methods.{name.replace('-', '_')}")
    (cls,) = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, TokenSelector)
        and value.__module__ == module.__name__
        and not value.__name__.startswith("_")
    ]
    return cls


def _arguments(spec: str, text: str) -> dict[str, Any]:
    """``"energy=0.5,center=false"`` as names and values; `spec` is the whole, for error messages."""
    arguments = {}
    for part in filter(None, _parts(text)):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"selector {spec!r}: {part!r} is not of the form argument=value")
        key, inner = key.strip(), value.strip()
        if key in arguments:
            raise ValueError(f"selector {spec!r}: {key} is given twice")

        # In parentheses: the spec of another selector, read when its parameter is known to take one. Otherwise YAML
        # decides what is a number, a truth value or a text, as it does in a config file.
        nested = inner.startswith("(") and inner.endswith(")")
        try:
            arguments[key] = inner[1:-1] if nested else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"selector {spec!r}: {value!r} is no value of YAML ({reason})") from error
    return arguments


def _parts(text: str) -> Iterable[str]:
    """Split at commas that are not inside parentheses."""
    start = depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            yield text[start:i]
            start = i + 1
    yield text[start:]
