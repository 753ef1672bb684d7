"""The learned selector of "When Less is Enough" (arXiv 2503.16660).

Known from the paper: three Transformer layers and a linear Gumbel-Softmax head give a binary mask over one tile's
encoder features (1 keep, 0 drop); at inference tokens are ranked by logit and a fixed number stays. Width, heads and
positions are not fixed there, hence arguments. Departures: features are normalised per channel with statistics of the
training set (CLIP features have huge norms), the projected tokens may be read instead or beside them, and by default
the training serves every budget with one ranking.

Shapes: B tiles, N patches, C channels read. The head has two classes, 0 = drop and 1 = keep: a Gumbel-Softmax over a
dimension of size one is constant, whatever the logits.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selector.table import Inputs, TableSelector, check_mlp_ratio, check_sizes
from selector.tokens import VisualTokens


class GumbelSelector(TableSelector):
    """Three Transformer layers over the features of a tile and a two-way keep/drop head.

    `logits` is one graph for ``torch.compile``; the choices around it depend on data and are not.

    Args:
        dim: C, channels of the table it reads.
        num_patches: N, patches per tile (learned positions).
        width: width of the Transformer; None takes `dim`.
        layers, heads: depth of the Transformer, and attention heads per layer.
        mlp_ratio: width of a layer's MLP, as a multiple of `width`.
        inputs: ``"features"``, ``"projected"`` or ``"both"``, see `TableSelector`.

    Example:
        >>> import torch
        >>> from selector import Budget, GumbelSelector, VisualTokens
        >>> tokens = VisualTokens.from_features(torch.randn(2, 16, 8))
        >>> GumbelSelector(dim=8, num_patches=16)(tokens, Budget(4)).sum(1).tolist()
        [4, 4]
    """

    paper = "When Less is Enough, arXiv 2503.16660"
    cost = "layers · (N² W + N W²)"

    def __init__(
        self,
        dim: int,
        num_patches: int,
        width: int | None = None,
        layers: int = 3,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        inputs: Inputs = "features",
    ):
        super().__init__(dim, inputs)
        self.num_patches, self.width = num_patches, width
        self.layers, self.heads, self.mlp_ratio = layers, heads, mlp_ratio

        inner = dim if width is None else width
        check_sizes(1, dim=dim, num_patches=num_patches, width=inner, layers=layers, heads=heads)
        check_mlp_ratio(mlp_ratio, inner)
        if inner % heads:
            raise ValueError(f"width {inner} must be a multiple of heads, got {heads} heads")

        # Nested tensors do not go with pre-norm layers, and torch would warn of it.
        self.embed = nn.Linear(dim, inner)
        self.position = nn.Parameter(torch.randn(num_patches, inner) * 0.02)  # the scale that ViT starts with
        layer = nn.TransformerEncoderLayer(
            inner, heads, round(inner * mlp_ratio), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(inner), enable_nested_tensor=False)
        self.head = nn.Linear(inner, 2)

    def logits(self, table: Float[Tensor, "B N C"]) -> Float[Tensor, "B N 2"]:
        """Logits of drop (0) and keep (1) per patch.

        Args:
            table: normalised features, see `table`.

        Raises:
            ValueError: a tile has another number of patches than `num_patches`.
        """
        # Positions are learned for this number of patches alone.
        if table.shape[-2] != self.num_patches:
            raise ValueError(f"the selector reads {self.num_patches} patches per tile, got {table.shape[-2]}")
        return self.head(self.encoder(self.embed(table) + self.position))

    def sample(
        self, table: Float[Tensor, "B N C"], temperature: float = 1.0
    ) -> tuple[Float[Tensor, "B N"], Float[Tensor, "B N 2"]]:
        """A straight-through Gumbel-Softmax draw: a 0/1 mask with the gradient of its relaxation, and the logits.

        Args:
            table: normalised features, see `table`.
            temperature: of the relaxation, above 0; it shapes the gradient and not the distribution of the mask.
        """
        logits = self.logits(table)
        return F.gumbel_softmax(logits, tau=temperature, hard=True, dim=-1)[..., 1], logits

    def score(self, tokens: VisualTokens) -> Float[Tensor, "T N"]:
        """Log-odds of keep against drop, without noise: the choice is deterministic at inference."""
        logits = self.logits(self.table(tokens))
        return logits[..., 1] - logits[..., 0]
