"""The one interface of every selector, in two levels.

`ScoreSelector` ranks: it gives every token a score and the budget does the rest; a new ranking method is one class with
one method. `TokenSelector` chooses a set: it returns the mask itself. Both are modules, so that a learned selector and
a formula are moved, saved, loaded and swapped alike.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selector.budget import Budget
from selector.tokens import VisualTokens


class TokenSelector(nn.Module, ABC):
    """Decides which visual tokens stay.

    Class attributes:
        needs: fields of `VisualTokens` that the method reads beside the geometry; an adapter computes only these.
        learned: True when the class is meaningless without trained weights; it is then loaded from a checkpoint only.
        paper: where the rule comes from, for tables.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    learned: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    @abstractmethod
    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        """Keep mask over the packed slots: True survives, order never changes, padding is False."""

    @property
    def init_args(self) -> dict[str, Any]:
        """Constructor arguments, read back from the attributes of the same names."""
        parameters = inspect.signature(type(self)).parameters.values()
        named = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        return {name: getattr(self, name) for name in named}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.init_args.items())

    def save_pretrained(self, folder: str | Path, card: str | None = None, metadata: dict | None = None) -> Path:
        """Writes config.json, model.safetensors and README.md, each atomically. See `selector.hub.save`."""
        from selector.hub import save

        return save(self, folder, card=card, metadata=metadata)

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, allow: Iterable[str] = ()) -> TokenSelector:
        """The selector that a folder (or a hub repository) holds, weights strict. See `selector.hub.load`."""
        from selector.hub import load

        loaded = load(name_or_path, allow=allow)
        if not isinstance(loaded, cls):
            raise TypeError(f"{name_or_path} holds a {type(loaded).__name__}, not a {cls.__name__}")
        return loaded

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves and uploads to the Hugging Face hub; returns the address of the commit."""
        from selector.hub import push

        return push(self, repo_id, **kwargs)


class ScoreSelector(TokenSelector):
    """Ranks visual tokens; higher survives."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Importance of every encoder token. Values where ``tokens.valid`` is False are ignored."""

    def forward(self, tokens: VisualTokens, budget: Budget) -> Bool[Tensor, "I L"]:
        return budget.select(self.score(tokens), tokens)
