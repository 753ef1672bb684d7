"""Questions and answers: one user turn [image, question] through the model's own processor and chat template.

Greedy decoding, one row at a time, so that every time measured is one sample's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from selector.evaluation.consistency import answer_nll
from selector.evaluation.cost import PrefillClock


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: decoded, without special tokens.
        ids: ``[A]`` the new tokens.
        logits: ``[A, V]`` raw logits that each was chosen from.
        prefill_seconds: from the finished prompt to the first new token.
    """

    text: str
    ids: Int[Tensor, "A"]
    logits: Float[Tensor, "A V"]
    prefill_seconds: float

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of its own tokens."""
        return answer_nll(self.logits, self.ids)


def prepare(processor: Any, image: Image.Image | None, question: str | None, device: torch.device) -> dict[str, Any]:
    """Model inputs for one user turn. Without a question the turn is the image alone; without an image, text alone."""
    content: list[dict[str, str]] = [{"type": "image"}] if image is not None else []
    if question is not None:
        content.append({"type": "text", "text": question})
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    arguments = {"text": text} if image is None else {"text": text, "images": image}
    return dict(processor(**arguments, return_tensors="pt").to(device))


def without_image(inputs: Mapping[str, Any], image_token_id: int) -> dict[str, Any]:
    """The blind prompt: the same text with every visual placeholder taken out, and no pixels."""
    words = inputs["input_ids"][0] != image_token_id
    return {name: inputs[name][:, words] for name in ("input_ids", "attention_mask")}


def answer(model: Any, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Answer:
    """Greedy answer to prepared (and perhaps pruned) inputs."""
    clock = PrefillClock()
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
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
    if clock.seconds is None:
        raise RuntimeError("generate returned without a new token: nothing to score")
    text = tokenizer.decode(ids, skip_special_tokens=True).strip()
    return Answer(text, ids, torch.cat(output.logits), clock.seconds)


def forced_nll(model: Any, inputs: Mapping[str, Any], target: Int[Tensor, "A"]) -> float:
    """Mean negative log-likelihood of a given answer after prepared inputs, teacher-forced in one forward pass."""
    new = _fresh(inputs)
    target = target.to(new["input_ids"].device)
    new["input_ids"] = torch.cat([new["input_ids"], target[None]], 1)
    new["attention_mask"] = torch.cat([new["attention_mask"], new["attention_mask"].new_ones(1, len(target))], 1)
    if "position_ids" in new:  # gaps stay where tokens were dropped; the answer goes on after the last
        more = torch.arange(1, len(target) + 1, device=target.device)
        new["position_ids"] = torch.cat([new["position_ids"], new["position_ids"][:, -1:] + more], 1)
    with torch.no_grad():
        logits = model(**new, use_cache=False, logits_to_keep=len(target) + 1).logits[0, :-1]
    return answer_nll(logits, target)


def _fresh(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with their own encoder output object: what reads it may also edit it."""
    new = dict(inputs)
    if "mm_encoder_outputs" in new:
        new["mm_encoder_outputs"] = {
            name: type(output)(pooler_output=list(output.pooler_output))
            for name, output in new["mm_encoder_outputs"].items()
        }
    return new
