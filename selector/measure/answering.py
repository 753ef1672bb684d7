"""Questions and answers: one user turn [image, question] through the model's own processor and chat template.

Decoding is greedy and one sample at a time, so that every measured time belongs to one sample; several at once are in
`selector.measure.batches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from selector.errors import UsageError
from selector.measure.consistency import answer_nll
from selector.measure.cost import GenerationClock, PeakMemory
from selector.models import Encoded, adapter_of, encode


@dataclass(frozen=True)
class Answer:
    """What the model answered.

    Attributes:
        text: decoded, without special tokens.
        ids: ``[A]`` ids of the new tokens.
        logits: ``[A, V]`` raw logits from which each token was chosen.
        prefill_seconds: from the finished prompt to the first new token.
        decode_seconds: per token after the first; None for an answer of one token.
        peak_bytes: highest memory allocated meanwhile, weights included; None except on a GPU.
        batch: rows that were answered together; both times are then the batch's, per row and per decoded token.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> given = Answer("no", torch.tensor([0, 1]), logits, prefill_seconds=0.31, decode_seconds=0.02)
        >>> round(given.nll, 3)  # -log(e^2 / (e^2 + 1)) for either token
        0.127
    """

    text: str
    ids: Int[Tensor, "A"]
    logits: Float[Tensor, "A V"]
    prefill_seconds: float
    decode_seconds: float | None = None
    peak_bytes: int | None = None
    batch: int = 1

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of its own tokens."""
        return answer_nll(self.logits, self.ids)


def prepare(
    processor: Any, image: Image.Image | None, question: str | None, device: torch.device, system: str = ""
) -> dict[str, Any]:
    """Model inputs for one user turn, through the processor's chat template.

    Args:
        image: None for a turn of text alone.
        question: None for a turn of the image alone.
        device: where the tensors go.
        system: what a system turn before it says; "" for none.

    Returns:
        The keyword arguments of the model's ``generate`` and ``forward``, for a batch of one.

    Raises:
        UsageError: the model's chat template has no place for a system turn.
    """
    content: list[dict[str, str]] = [{"type": "image"}] if image is not None else []
    if question is not None:
        content.append({"type": "text", "text": question})

    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    if system not in text:  # some templates drop a turn that they do not know
        raise UsageError(f"system must be empty for this model, whose chat template has no system turn, got {system!r}")

    # A text alone leaves the argument out: not every processor takes ``images=None``.
    arguments = {"text": text} if image is None else {"text": text, "images": image}
    return dict(processor(**arguments, return_tensors="pt").to(device))


def encode_image(
    model: Any, processor: Any, image: Image.Image, question: str | None, needs: frozenset[str]
) -> tuple[dict[str, Any], Encoded]:
    """One image (and a question about it) through the processor and the vision tower, without gradients.

    Args:
        needs: fields of `VisualTokens` that the selectors to come read.

    Returns:
        (the model's inputs as `prepare` makes them, the encoded image).

    Raises:
        ValueError: a field that this model cannot give.
        RuntimeError: a processor that makes no pixels of an image.
    """
    inputs = prepare(processor, image, question, model.device)
    with torch.no_grad():
        encoded = encode(model, inputs, needs)
    if encoded is None:
        raise RuntimeError("the processor made no pixels of an image")
    return inputs, encoded


def without_image(inputs: Mapping[str, Any], image_token_id: int) -> dict[str, Any]:
    """The blind prompt: the same text with every visual placeholder taken out, and no pixels.

    Args:
        inputs: of a batch of one, as `prepare` returns them.
        image_token_id: id of the placeholder.
    """
    ids = inputs["input_ids"]
    words = ids[0] != image_token_id

    # All that has an entry per token stays, token types too: a PaliGemma without them would read its answer both ways.
    return {
        name: value[:, words]
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.shape == ids.shape and name != "position_ids"
    }


def answer(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Answer:
    """Greedy answer to prepared (and perhaps pruned) inputs.

    Args:
        inputs: of a batch of one, as `prepare` or `selector.pruning.prune_inputs` gives them.
        max_new_tokens: at least 1.

    Raises:
        RuntimeError: ``generate`` returned without a new token.
    """
    clock, memory = GenerationClock(), PeakMemory(model.device)

    # Many chat models have no padding token; ``generate`` then warns with every call.
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    # The sampling settings of a checkpoint's generation config are set aside one by one: transformers warns of any that
    # is left while ``do_sample`` is off. The clock is the streamer, so that times come from this very call.
    with torch.no_grad(), memory:
        output = model.generate(
            **_fresh(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=True,
            streamer=clock,
        )

    ids = output.sequences[0, inputs["input_ids"].shape[1] :]
    if clock.prefill_seconds is None:
        raise RuntimeError("generate returned without a new token: nothing to score")
    logits, text = torch.cat(output.logits), decoded(processor, ids)
    return Answer(text, ids, logits, clock.prefill_seconds, clock.decode_seconds, memory.bytes)


def decoded(processor: Any, ids: Int[Tensor, "A"]) -> str:
    """The text of an answer, without special tokens and the space around it."""
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Forced:
    """One forward pass over a prompt and a given answer (teacher forcing).

    Attributes:
        logits: ``[A, V]`` row i predicts answer token i.
        visual: hidden states of the visual tokens, ``[L, d]`` for each layer asked for.

    Example:
        >>> reading = Forced(logits=torch.zeros(3, 512), visual={4: torch.zeros(64, 96)})
        >>> reading.logits.softmax(-1)[0, 7].item() == 1 / 512  # of token 7 as the first of the answer
        True
        >>> list(reading.visual[4].shape)  # 64 visual tokens, as block 4 leaves them
        [64, 96]
    """

    logits: Float[Tensor, "A V"]
    visual: Mapping[int, Float[Tensor, "L d"]]


def forced(
    model: Any,
    inputs: Mapping[str, Any],
    target: Int[Tensor, "A"],
    layers: Sequence[int] = (),
    image_token_id: int | None = None,
) -> Forced:
    """The model reads a given answer after prepared inputs, in one pass (teacher forcing).

    Args:
        target: ids of the answer to read.
        layers: whose hidden states of the visual tokens are wanted: 0 for what enters the language model, k for what
            leaves its k-th block (the last: normed).
        image_token_id: what marks the visual tokens; needed with layers.
    """
    new = _fresh(inputs)
    target = target.to(new["input_ids"].device)
    prompt = new["input_ids"]

    # The answer is appended to everything that has one entry per prompt token.
    new["input_ids"] = torch.cat([prompt, target[None]], 1)
    new["attention_mask"] = torch.cat([new["attention_mask"], new["attention_mask"].new_ones(1, len(target))], 1)
    if "position_ids" in new:  # gaps stay where tokens were dropped; the answer continues after the last one
        more = torch.arange(1, len(target) + 1, device=target.device)
        new["position_ids"] = torch.cat([new["position_ids"], new["position_ids"][..., -1:] + more], -1)
    # Families have inputs of their own per token (token types, say); their adapter names the value for text.
    rows = token_rows(model)
    for name in rows.keys() & new.keys():
        new[name] = torch.cat([new[name], new[name].new_full((1, len(target)), rows[name][1])], 1)

    # One logit more than the answer has tokens: the last token of the prompt predicts the first of the answer, and what
    # the last token of the answer predicts is dropped below.
    with torch.no_grad():
        output = model(**new, use_cache=False, logits_to_keep=len(target) + 1, output_hidden_states=bool(layers))

    seen = prompt[0] == image_token_id
    visual = {k: output.hidden_states[k][0, : prompt.shape[1]][seen] for k in layers}
    return Forced(output.logits[0, :-1], visual)


def token_rows(model: Any) -> Mapping[str, tuple[int, int]]:
    """The arguments of a prompt's own shape that a family has, see `selector.models.Adapter`; none without adapter."""
    try:
        return adapter_of(model).rows
    except ValueError:  # a model that no selector prunes can be asked all the same
        return {}


def _fresh(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with an encoder output object of their own: a model's forward may edit the one it is given."""
    new = dict(inputs)
    if "mm_encoder_outputs" in new:
        new["mm_encoder_outputs"] = {name: type(output)(**output) for name, output in new["mm_encoder_outputs"].items()}
    return new
