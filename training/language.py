"""The frozen language model while a selector learns from it: its answers with all visual tokens, and with gated ones.

Only the selector is trained. Gradients pass through the language model to the gates and on to the scores, but its own
weights get none. Everything runs on one packed row per ranking (see `training.conversations`), at the position ids of
the full prompt, so that a gated pass and a pruned one see the same distances.

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
"""Smallest gate in a logarithm: 1e-5 of a key's attention weight is negligible, and its gradient is finite."""
FAINT = 0.01
"""Tokens with a smaller gate are left out of a gated pass, which therefore costs little more than a pruned one.

While gates are still soft, the tokens left out can together hold a tenth of the budget and more; once gates are nearly
binary, they hold almost none of it."""


@dataclass(frozen=True)
class Row:
    """A packed row, ready for the language model.

    Attributes:
        embeddings: ``[S, d]`` input embeddings.
        positions: ``[S]`` position ids in the full prompt of each branch.
        bias: ``[S, S]`` additive attention mask, the logarithms of the gates included.
        answers: per branch, the index in the row of the token that predicts the answer's first, and how many there are.
        visual: ``[v]`` indices in the row of the visual tokens.

    >>> row = Row(torch.zeros(7, 8), torch.arange(7), torch.zeros(7, 7), answers=[(4, 2)], visual=torch.tensor([1, 2]))
    >>> [row.embeddings[start : start + length].shape for start, length in row.answers]  # where the answer is predicted
    [torch.Size([2, 8])]
    """

    embeddings: Float[Tensor, "S d"]
    positions: Int[Tensor, "S"]
    bias: Float[Tensor, "S S"]
    answers: list[tuple[int, int]]
    visual: Int[Tensor, "v"]


class FrozenLanguageModel:
    """Log-probabilities of answers with all visual tokens, with gated ones, or with some pruned.

    Args:
        model: a LLaVA-NeXT whose weights are frozen.

    Raises:
        ValueError: gradient checkpointing is on and the language model has dropout, which would then be active.

    >>> from training.encoders import LlavaNextModel
    >>> from training.pages import page
    >>> model, shown = LlavaNextModel("checkpoints/llava-next-tiny"), page("documents", "test", 0, 0)
    >>> asked = model.converse(shown.image, [(shown.turns[0].question, shown.turns[0].answer)])
    >>> encoded, language = model.encoded(asked, frozenset()), FrozenLanguageModel(model.model)
    >>> (logs,) = language.answer_log_probs(encoded, asked, branches=[0])
    >>> logs.shape, model.converse.processor.decode(logs.argmax(-1))  # 11 tokens, of a vocabulary of 202
    (torch.Size([11, 202]), 'TOTAL 6541</s>')
    """

    def __init__(self, model: Any):
        self.model = model

        # The flag of the layers: the model's own has another name from one version of transformers to the next.
        layers = model.model.language_model.modules()
        self.checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
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
        """The model's distributions over the vocabulary where it predicts the tokens of each answer.

        Args:
            encoded: the conversation's image, alone.
            conversation: prefix and questions; those asked about need an answer.
            branches: indices of the questions.
            gates: ``[L]`` of every visual slot, in [0, 1]; None: no token is gated.
            keep: ``[L]`` slots to keep; None: all (with gates: those that are not faint).
            noise: the gates mix a token with noise of the tokens' own mean and spread, ``sqrt(g) x + sqrt(1 - g) e``,
                instead of dimming the attention to it. No token is left out then.

        Returns:
            Per question, log-probabilities ``[A, V]`` in float32.
        """
        chosen = [conversation.branches[index] for index in branches]
        packed = encoded.packed[0]

        # A bias of log(g) multiplies the unnormalised attention to a visual key by its gate.
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
        """Packs the prefix and the branches into one row.

        Args:
            packed: ``[L, d]`` projected visual tokens, newlines included, in the order of the prompt.
            image_token_id: placeholder of a visual token in the prefix.
            prefix: ``[P]`` ids with L placeholders.
            branches: questions with their answers.
            keep: ``[L]`` visual tokens to keep; None: all.
            bias: ``[v]`` added to the attention to each visual token that is kept.

        Raises:
            ValueError: a branch without an answer.
        """
        embed = self.model.get_input_embeddings()
        visual = prefix == image_token_id
        embeddings = embed(prefix).masked_scatter(visual[:, None], packed.to(embed.weight.dtype))
        positions = torch.arange(len(prefix), device=prefix.device)

        # Pruned before packing, with the positions that the tokens had: distances are those of the full prompt.
        if keep is not None:
            there = ~visual
            there[visual] = keep
            embeddings, positions, visual = embeddings[there], positions[there], visual[there]

        # Every branch starts at the position behind the full prefix, as if it were the only one.
        parts, part_positions = [embeddings], [positions]
        member = [torch.full_like(positions, -1)]  # -1: the prefix, which every branch attends to
        answers = []
        start = len(positions)
        for number, branch in enumerate(branches):
            if branch.answer is None:
                raise ValueError(f"the answer to {branch.question!r} must be known before it is scored")
            ids = torch.cat([branch.prompt, branch.answer])
            parts.append(embed(ids))
            part_positions.append(len(prefix) + torch.arange(len(ids), device=ids.device))
            member.append(torch.full_like(ids, number))
            answers.append((start + len(branch.prompt) - 1, len(branch.answer)))  # a token is predicted one before
            start += len(ids)

        # The gates as a bias on columns, for every query alike; `index_put` keeps them in the graph.
        mask = _branch_mask(torch.cat(member), embeddings.dtype)
        columns = visual.nonzero()[:, 0]
        if bias is not None:
            mask = mask + mask.new_zeros(len(mask)).index_put((columns,), bias.to(mask.dtype))
        return Row(torch.cat(parts), torch.cat(part_positions), mask, answers, columns)

    def hidden(self, row: Row) -> Float[Tensor, "S d"]:
        """Last hidden states ``[S, d]`` of a row."""
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
        """Per answer, log-probabilities ``[A, V]`` where its tokens are predicted; only there is the head applied."""
        hidden = self.hidden(row)
        return [
            self.model.lm_head(hidden[start : start + length]).float().log_softmax(-1) for start, length in row.answers
        ]

    @torch.no_grad()
    def attention_to_image(self, row: Row) -> tuple[list[Float[Tensor, "_A V"]], Float[Tensor, "b v"]]:
        """Log-probabilities of every answer, and what its tokens attend to in the image.

        Works with any attention implementation, since attention is recomputed from the inputs of each layer.

        Args:
            row: of b branches, all visual tokens there and without gates.

        Returns:
            Log-probabilities ``[A, V]`` per answer, and attention ``[b, v]``: from the tokens that predict the answer
            to the visual tokens, renormalised to these, squared, and averaged over layers, heads and tokens. Squaring
            favours heads that attend to something particular over those that attend everywhere.
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
        """The model's greedy answer of at most `limit` tokens, with the token that ends it if it got that far.

        Args:
            encoded: the conversation's image, alone.
            conversation: prefix and questions.
            branch: index of the question.
            limit: largest number of tokens.

        Returns:
            ``[A]`` ids.
        """
        prompt = torch.cat([conversation.prefix, conversation.branches[branch].prompt])[None]
        settings = self.model.generation_config
        pad = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id

        # The image is encoded already: the model takes the features in place of pixels.
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
    """Tokens mixed with noise as their gates close: ``sqrt(g) x + sqrt(1 - g) e`` (AutoSelect, DiffPrune).

    Args:
        packed: ``[L, d]`` tokens x of one image.
        gates: ``[L]`` in [0, 1]; at 1 a token is itself, but for rounding.
        generator: draws the noise e, which has the mean and spread of the image's tokens in every channel.

    Returns:
        ``[L, d]``.
    """
    noise = torch.randn(packed.shape, generator=generator).to(packed)
    noise = packed.mean(0) + noise * packed.std(0)

    # Both square roots have an infinite slope at 0.
    root = gates.clamp(FLOOR, 1 - FLOOR).to(packed.dtype)[:, None]
    return root.sqrt() * packed + (1 - root).sqrt() * noise


def _branch_mask(member: Int[Tensor, "S"], dtype: torch.dtype) -> Float[Tensor, "S S"]:
    """Additive causal mask, where a branch attends to the prefix (-1) and to itself."""
    causal = torch.ones(len(member), len(member), dtype=torch.bool, device=member.device).tril()
    seen = causal & ((member[None] == -1) | (member[None] == member[:, None]))

    # Half the smallest number, so that the logarithm of a gate can be added without reaching -inf.
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min / 2)


@contextmanager
def _listening(language_model: Any) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(attention module, its keyword arguments) of every layer, in order; the hooks are removed when the block ends."""
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
    """Squared attention from `places` to the visual tokens among themselves, averaged over heads and places."""
    hidden, (cos, sin) = seen["hidden_states"][0], seen["position_embeddings"]
    queries = _heads(attention, "q", hidden[places], cos[0, places], sin[0, places])
    keys = _heads(attention, "k", hidden[visual], cos[0, visual], sin[0, visual])
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)  # grouped-query attention shares keys among heads

    # A softmax over the visual keys alone is the attention to them, renormalised.
    scores = queries.float() @ keys.float().mT * attention.scaling
    return scores.softmax(-1).square().mean((0, 1))


def _heads(
    attention: Any, part: str, hidden: Float[Tensor, "s d"], cos: Float[Tensor, "s c"], sin: Float[Tensor, "s c"]
) -> Float[Tensor, "h s c"]:
    """Queries or keys per head, rotated to their positions (RoPE)."""
    x = getattr(attention, f"{part}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)  # some language models (Qwen3) norm each head
    x = (x if norm is None else norm(x)).transpose(0, 1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
