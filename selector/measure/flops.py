"""Floating-point operations by formula: 2 per multiply-add, matrix products only, as torch counts them.

With S tokens, width D, hidden width m of the MLP, query width q = heads · head width, key and value width k:

    tower, per layer    8·S·D² + 4·S²·D + 4·S·D·m           S: patches of a tile, and CLS where there is one
    tower, once         2·N·D·3·patch² (embedding) + SigLIP's pooling head, which transformers computes and drops
    projector           2·N·(D·d + d²)                       every patch of every tile, before unpadding
    Qwen2.5-VL's tower  8·N·D² + 6·N·D·m + 4·N·C·D           per layer; C: N, or the patches of a window
    language, per layer 4·S·d·(q + k) + 4·S·C·q + 6·S·d·m    S tokens in, each over a context of C (no causal discount)
    head                2·d·V                                one position: all that generation needs

A prefill of S tokens has C = S; a decoded token has S = 1 and C = what is in the cache, itself included; where tokens
leave inside the language model, every layer has an S and a C of its own. Tests hold the formulas against
``torch.utils.flop_counter``. A selector is counted by that counter itself, and its decompositions,
which torch does not count, by Golub & Van Loan (4th ed., sections 3 to 5 and 8): eigenvectors of n × n 9·n³ (the
counter cannot tell eigenvalues alone from these); QR of n × k 4·n·k²; SVD of n × k with vectors 14·n·k² + 8·k³ (n ≥ k);
Cholesky factor of n × n n³/3, inverse from it 2·n³/3, solving a triangle of n × n for k columns n²·k. Nor does it count
the layer of a torch Transformer that inference runs as one operation: as a layer of the tower above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

TOWERS = ("clip_vision_model", "siglip_vision_model")
LANGUAGES = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")


def tower_flops(config: Any, tiles: int) -> int | None:
    """Vision tower and projector of a LLaVA-NeXT over its tiles.

    Args:
        config: of the whole model.
        tiles: their number, the base view included.

    Returns:
        Operations; None for a tower of another kind.
    """
    vision, width = config.vision_config, config.text_config.hidden_size
    if vision.model_type not in TOWERS:
        return None
    d, m, patches = vision.hidden_size, vision.intermediate_size, (vision.image_size // vision.patch_size) ** 2
    clip = vision.model_type == TOWERS[0]  # it alone has a CLS token
    s = patches + int(clip)

    # Projections and output (8), scores and their product with the values (4), both layers of the MLP (4).
    layers = vision.num_hidden_layers * (8 * s * d**2 + 4 * s**2 * d + 4 * s * d * m)
    embedding = 2 * patches * d * vision.num_channels * vision.patch_size**2
    pooling = 0
    if not clip and getattr(vision, "vision_use_head", True):  # one query over the patches, and an MLP
        pooling = 2 * d**2 * (2 + 2 * patches) + 4 * patches * d + 4 * d * m

    return tiles * (embedding + layers + pooling + 2 * patches * (d * width + width**2))


def qwen_tower_flops(config: Any, tokens: int) -> int | None:
    """Vision tower and merger of a Qwen2.5-VL over one image, whose sides are multiples of its attention windows.

    Args:
        config: of the whole model.
        tokens: that the image gives the language model, each of 2 x 2 patches.

    Returns:
        Operations; None for a tower of another kind.
    """
    vision = config.vision_config
    if vision.model_type != "qwen2_5_vl_vision":
        return None
    d, m, merged = vision.hidden_size, vision.intermediate_size, vision.spatial_merge_size**2
    patches = tokens * merged

    # Most layers attend within windows; the MLP is gated, and has three matrices.
    window, whole = (vision.window_size // vision.patch_size) ** 2, len(vision.fullatt_block_indexes)
    contexts = whole * patches + (vision.depth - whole) * window
    layers = vision.depth * (8 * patches * d**2 + 6 * patches * d * m) + 4 * patches * contexts * d
    embedding = 2 * patches * d * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    wide = d * merged
    return embedding + layers + 2 * tokens * (wide**2 + wide * vision.out_hidden_size)


def language_flops(config: Any, tokens: int | Sequence[int], context: int | Sequence[int]) -> int | None:
    """The language model reading `tokens` over a context of `context`, and one row of logits.

    Args:
        config: of the whole model.
        tokens: that go in: the prompt for a prefill, 1 for a decoded token; one number for all layers, or one per
            layer where tokens leave between them.
        context: what each of them attends to, itself included; as `tokens`.

    Returns:
        Operations; None for a language model whose layers are of another kind.

    Example:
        >>> from transformers import LlamaConfig, LlavaNextConfig
        >>> text = LlamaConfig(
        ...     hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128, vocab_size=100
        ... )
        >>> language_flops(LlavaNextConfig(text_config=text), tokens=1, context=1)
        177152
    """
    text = config.text_config
    if text.model_type not in LANGUAGES:
        return None
    d, head = text.hidden_size, _head_width(text)
    # Grouped queries: fewer heads of keys and values than of queries.
    q, k = text.num_attention_heads * head, text.num_key_value_heads * head
    layers = [
        4 * s * d * (q + k) + 4 * s * c * q + 6 * s * d * text.intermediate_size
        for s, c in zip(_by_layer(text, tokens), _by_layer(text, context), strict=True)
    ]
    return sum(layers) + 2 * d * text.vocab_size


def cache_bytes(config: Any, tokens: int | Sequence[int], element: int) -> int:
    """Bytes of the keys and values of `tokens` (in every layer, or per layer), `element` bytes per number."""
    text = config.text_config
    return 2 * text.num_key_value_heads * _head_width(text) * element * sum(_by_layer(text, tokens))


def counted_flops(work: Callable[[], Any]) -> int:
    """Operations of a call, by torch's own counter; decompositions by the formulas above."""
    with torch.no_grad(), flop_counter() as counter:
        work()
    return counter.get_total_flops()


def flop_counter() -> FlopCounterMode:
    """Torch's own counter, which knows the formulas above for decompositions."""
    aten = torch.ops.aten
    # The counter knows no decomposition: it would count none of its work.
    formulas = {
        aten._linalg_eigh: _eigh,
        aten.linalg_qr: lambda shape, *_, **__: math.prod(shape[:-2]) * 4 * max(shape[-2:]) * min(shape[-2:]) ** 2,
        aten._linalg_svd: _svd,
        aten._transformer_encoder_layer_fwd: _encoder_layer,
        aten.linalg_cholesky_ex: lambda shape, *_, **__: math.prod(shape[:-2]) * shape[-1] ** 3 // 3,
        aten.cholesky_inverse: lambda shape, *_, **__: math.prod(shape[:-2]) * 2 * shape[-1] ** 3 // 3,
        aten.linalg_solve_triangular: lambda shape, other, *_, **__: math.prod(other) * shape[-1],
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _eigh(shape: Any, *_: Any, **__: Any) -> int:
    # Leading dimensions are a batch of matrices, here and below.
    return math.prod(shape[:-2]) * 9 * shape[-1] ** 3


def _svd(shape: Any, *_: Any, **__: Any) -> int:
    k, n = sorted(shape[-2:])
    return math.prod(shape[:-2]) * (14 * n * k**2 + 8 * k**3)


def _encoder_layer(shape: Any, width: int, heads: int, *rest: Any, **_: Any) -> int:
    hidden = rest[11][0]  # rows of the first matrix of the MLP, by the signature of the operation
    batch, tokens = math.prod(shape[:-2]), shape[-2]
    return batch * (8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * hidden)


def _by_layer(text: Any, tokens: int | Sequence[int]) -> Sequence[int]:
    return [tokens] * text.num_hidden_layers if isinstance(tokens, int) else tokens


def _head_width(text: Any) -> int:
    # Some configs have the field and leave it None.
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
