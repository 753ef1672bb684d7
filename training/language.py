"""The frozen language model while a selector learns from it: its answers with all visual tokens, and with gated ones.

Only the selector is trained. Gradients pass through the language model to the gates and on to the scores; none of its
weights gets one. Everything runs on one packed row per ranking (see `training.conversations`), at the position ids
that the full prompt has, so a gated pass and a pruned one see the same distances.

Shapes: L visual slots of an image, S tokens of a row, A tokens of an answer, V vocabulary, d width of the language
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selector.models import Encoded
from training.conversations import Branch, Conversation

FLOOR = 1e-5
"""Gates below this count as this in a logarithm: exp(-11.5) of a key's attention is nothing, its gradient is finite."""
FAINT = 0.01
"""Tokens dimmer than this are left out of a gated pass, which so costs little more than a pruned one.

While gates are still soft, tokens left out can together hold a tenth of the budget and more; nothing is left of that
once gates have become nearly binary."""


@dataclass(frozen=True)
class Row:
    """A packed row, ready for the language model.

    Attributes:
        embeddings: ``[S, d]``.
        positions: ``[S]`` position ids in the full prompt of each branch.
        bias: ``[S, S]`` additive attention mask.
        answers: (row of the token that predicts the answer's first, length) of every branch.
        visual: ``[v]`` places of the visual tokens in the row.
    """

    embeddings: Float[Tensor, "S d"]
    positions: Int[Tensor, "S"]
    bias: Float[Tensor, "S S"]
    answers: list[tuple[int, int]]
    visual: Int[Tensor, "v"]


class FrozenLanguageModel:
    """Log-probabilities of answers under visual tokens that are all there, gated, or pruned.

    Args:
        model: a LLaVA-NeXT whose weights are frozen.

    Raises:
        ValueError: its language model has gradient checkpointing on and dropout, which would come on with it.
    """

    def __init__(self, model: Any):
        self.model = model
        self.checkpointing = bool(getattr(model.model.language_model, "is_gradient_checkpointing", False))
        if self.checkpointing and getattr(model.config.text_config, "attention_dropout", 0):
            raise ValueError("gradient_checkpointing needs a language model without dropout")

    def answer_log_probs(
        self,
        encoded: Encoded,
        conversation: Conversation,
        branches: Sequence[int],
        *,
        gates: Float[Tensor, "L"] | None = None,
        keep: Bool[Tensor, "L"] | None = None,
        noise: torch.Generator | None = None,
    ) -> list[Float[Tensor, "_A V"]]:
        """What the model says where it should say the tokens of each answer.

        Args:
            encoded: the conversation's image, alone.
            branches: which of the questions.
            gates: of every visual slot in [0, 1]; None: all are there.
            keep: slots that are there; None: all (with gates: those that are not faint).
            noise: the gates mix a token with noise of the tokens' own mean and spread, ``sqrt(g) x + sqrt(1 - g) e``,
                instead of dimming the attention to it. No token is left out then.
        """
        chosen = [conversation.branches[index] for index in branches]
        packed = encoded.packed[0]
        bias = None
        if gates is not None and noise is not None:
            packed = noisy_tokens(packed, gates, noise)
        elif gates is not None:
            keep = gates.detach() > FAINT if keep is None else keep
            bias = gates[keep].clamp(min=FLOOR).log()
        row = self.row(packed, encoded.image_token_id, conversation.prefix, chosen, keep, bias)
        return self.log_probs(row)

    def row(
        self,
        packed: Float[Tensor, "L d"],
        image_token_id: int,
        prefix: Int[Tensor, "P"],
        branches: Sequence[Branch],
        keep: Bool[Tensor, "L"] | None = None,
        bias: Float[Tensor, "v"] | None = None,
    ) -> Row:
        """Packs the prefix (of its visual tokens those kept) and the branches; `bias` is added to visual keys."""
        embed = self.model.get_input_embeddings()
        visual = prefix == image_token_id
        embeddings = embed(prefix).masked_scatter(visual[:, None], packed.to(embed.weight.dtype))
        positions = torch.arange(len(prefix), device=prefix.device)
        if keep is not None:
            there = ~visual
            there[visual] = keep
            embeddings, positions, visual = embeddings[there], positions[there], visual[there]

        parts, places = [embeddings], [positions]
        member = [torch.full_like(positions, -1)]  # -1: the prefix, which every branch sees
        answers = []
        start = len(positions)
        for number, branch in enumerate(branches):
            if branch.answer is None:
                raise ValueError(f"the answer to {branch.question!r} must be known before it is scored")
            ids = torch.cat([branch.prompt, branch.answer])
            parts.append(embed(ids))
            places.append(len(prefix) + torch.arange(len(ids), device=ids.device))
            member.append(torch.full_like(ids, number))
            answers.append((start + len(branch.prompt) - 1, len(branch.answer)))
            start += len(ids)

        mask = _branch_mask(torch.cat(member), embeddings.dtype)
        columns = visual.nonzero()[:, 0]
        if bias is not None:
            mask = mask + mask.new_zeros(len(mask)).index_put((columns,), bias.to(mask.dtype))
        return Row(torch.cat(parts), torch.cat(places), mask, answers, columns)

    def hidden(self, row: Row) -> Float[Tensor, "S d"]:
        """Last hidden states of a row."""
        language_model = self.model.model.language_model
        # transformers checkpoints layers in training mode only, and generates wrongly in it: on for this pass alone.
        language_model.train(self.checkpointing and torch.is_grad_enabled())
        try:
            output = language_model(
                inputs_embeds=row.embeddings[None],
                attention_mask=row.bias[None, None],
                position_ids=row.positions[None],
                use_cache=False,
            )
        finally:
            language_model.eval()
        return output.last_hidden_state[0]

    def log_probs(self, row: Row) -> list[Float[Tensor, "_A V"]]:
        """Of the tokens of every answer."""
        hidden = self.hidden(row)
        return [
            self.model.lm_head(hidden[start : start + length]).float().log_softmax(-1) for start, length in row.answers
        ]

    @torch.no_grad()
    def attention_to_image(self, row: Row) -> tuple[list[Float[Tensor, "_A V"]], Float[Tensor, "b v"]]:
        """Log-probabilities of every answer, and what its tokens look at in the image.

        The second is per branch the attention from the places that predict the answer to the visual tokens,
        renormalised to these, squared, and averaged over layers, heads and places: the square counts heads that look
        at something and not those that look everywhere. Works under any attention implementation: it is computed from
        the queries and keys as they pass by. A softmax over the visual keys alone is the renormalised attention.
        """
        with _listening(self.model.model.language_model) as heard:
            logs = self.log_probs(row)
        looks = []
        for start, length in row.answers:
            places = torch.arange(start, start + length, device=row.visual.device)
            looks.append(torch.stack([_look(attention, seen, places, row.visual) for attention, seen in heard]).mean(0))
        return logs, torch.stack(looks)

    @torch.no_grad()
    def own_answer(self, encoded: Encoded, conversation: Conversation, branch: int, limit: int) -> Int[Tensor, "A"]:
        """The model's greedy answer of at most `limit` tokens, with the token that ends it if it came to that."""
        prompt = torch.cat([conversation.prefix, conversation.branches[branch].prompt])[None]
        settings = self.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id
        output = self.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            mm_encoder_outputs={"image": type(encoded.output)(pooler_output=list(encoded.packed))},
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
        )
        return output[0, prompt.shape[1] :]


def noisy_tokens(
    packed: Float[Tensor, "L d"], gates: Float[Tensor, "L"], generator: torch.Generator
) -> Float[Tensor, "L d"]:
    """Tokens drowned in noise as their gates close: ``sqrt(g) x + sqrt(1 - g) e`` (AutoSelect, DiffPrune).

    e has the mean and the spread of the image's tokens, channel by channel; at g = 1 a token is itself.
    """
    noise = torch.randn(packed.shape, generator=generator).to(packed)
    noise = packed.mean(0) + noise * packed.std(0)
    root = gates.clamp(FLOOR, 1 - FLOOR).to(packed.dtype)[:, None]
    return root.sqrt() * packed + (1 - root).sqrt() * noise


def _branch_mask(member: Int[Tensor, "S"], dtype: torch.dtype) -> Float[Tensor, "S S"]:
    """Causal; a branch sees the prefix (-1) and itself."""
    causal = torch.ones(len(member), len(member), dtype=torch.bool, device=member.device).tril()
    seen = causal & ((member[None] == -1) | (member[None] == member[:, None]))
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min / 2)


@contextmanager
def _listening(language_model: Any) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(attention, what it was given) of every layer, in order; the hooks are gone when the block ends."""
    heard: list[tuple[Any, dict[str, Any]]] = []
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: heard.append((module, kwargs)), with_kwargs=True
        )
        for layer in language_model.layers
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _look(
    attention: Any, seen: dict[str, Any], places: Int[Tensor, "A"], visual: Int[Tensor, "v"]
) -> Float[Tensor, "v"]:
    """Squared attention from `places` to the visual tokens among themselves, mean over heads and places."""
    hidden, (cos, sin) = seen["hidden_states"][0], seen["position_embeddings"]
    queries = _heads(attention, "q", hidden[places], cos[0, places], sin[0, places])
    keys = _heads(attention, "k", hidden[visual], cos[0, visual], sin[0, visual])
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    scores = queries.float() @ keys.float().mT * attention.scaling
    return scores.softmax(-1).square().mean((0, 1))


def _heads(
    attention: Any, part: str, hidden: Float[Tensor, "s d"], cos: Float[Tensor, "s c"], sin: Float[Tensor, "s c"]
) -> Float[Tensor, "h s c"]:
    """Queries or keys per head, turned to their positions."""
    x = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)  # some language models (Qwen3) norm each head
    x = (x if norm is None else norm(x)).transpose(0, 1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
