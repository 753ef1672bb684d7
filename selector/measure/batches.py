"""Several prompts answered at once: padded on the left, prefilled together, decoded until each row has ended.

One prefill serves both what is asked of a pruned prompt: its greedy answer, and its logits over the unpruned model's
answer, which is read on a copy of the cache. Rows leave the batch as they end. Answers are those of ``generate`` row by
row; logits differ from those of a single row in the last bits, so that an exact tie may fall differently (which in
bfloat16 is not rare).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selector.errors import UsageError
from selector.inside import Memory
from selector.measure.answering import Answer, decoded, token_rows
from selector.measure.cost import PeakMemory, Spent
from selector.models import adapter_of, available_adapters, model_type_of
from selector.pruning import Pruned

SETTLED = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
        *("max_length", "max_new_tokens", "use_cache", "cache_implementation", "transformers_version"),
        *("output_attentions", "output_hidden_states", "return_dict_in_generate"),
    }
)
"""Fields of a generation config that change no greedy answer; any other would, and only ``generate`` follows it."""


@dataclass(frozen=True)
class Reading:
    """What a batch gave for one of its rows.

    Attributes:
        answer: greedy; its times are the batch's, per row and per decoded token.
        forced: ``[A, V]`` logits over the target, teacher-forced; None without a target.
        visual: ``[L, d]`` hidden states of the visual tokens, for each layer asked for.

    Example:
        >>> from selector.measure.answering import prepare
        >>> from selector.commands.loading import load_model
        >>> model, processor = load_model("checkpoints/llava-next-tiny", "cpu")
        >>> rows = [prepare(processor, None, question, model.device) for question in ("is it red?", "a thing?")]
        >>> with torch.no_grad():
        ...     readings = read(model, processor, rows, [None, None], max_new_tokens=1, spent=Spent(model.device))
        >>> [(len(reading.answer.ids), reading.answer.batch) for reading in readings]
        [(1, 2), (1, 2)]
    """

    answer: Answer
    forced: Float[Tensor, "A V"] | None
    visual: Mapping[int, Float[Tensor, "L d"]]


def refusal(model: Any) -> str | None:
    """Why this model is asked one prompt at a time; None where it may be asked in batches."""
    kind = model_type_of(model)
    if kind not in available_adapters():
        return f"no adapter for models of type {kind!r} says how to pad a prompt"

    # The loop below is plain argmax: a penalty or a suppressed token is for `generate`.
    settings = model.generation_config.to_diff_dict()
    steering = sorted(name for name in settings if name not in SETTLED and not name.startswith("_"))
    if steering:
        return f"its generation config sets {', '.join(steering)}"
    return None


def read(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Int[Tensor, "_"] | None],
    max_new_tokens: int,
    spent: Spent,
    layers: Sequence[int] = (),
    image_token_ids: Sequence[int | None] = (),
    pruned: Pruned | None = None,
) -> list[Reading]:
    """Greedy answers to several prompts, and their logits over given answers.

    Args:
        rows: inputs of batches of one, as `selector.pruning.prune_inputs` or `without_image` give them.
        targets: per row, ids of an answer to read as well.
        max_new_tokens: at least 1.
        spent: what the time is charged to.
        layers: after which the visual tokens are returned, from 1.
        image_token_ids: per row, what marks them; needed with layers.
        pruned: of a single row whose tokens leave inside the language model.

    Raises:
        UsageError: an argument of a row that cannot be padded, by name.
        ValueError: several rows with `pruned`, or what `selector.inside` refuses by name.
    """
    if pruned is not None and len(rows) != 1:
        raise ValueError(f"rows must be one where tokens leave inside the language model, got {len(rows)}")
    memory, caches = PeakMemory(model.device), Memory()
    with torch.no_grad(), memory, pruned.acting(model, caches) if pruned else nullcontext():
        with spent.on("prefill"):
            inputs = pad_left(model, rows)
            start = time.perf_counter()
            output = model(**inputs, use_cache=True, logits_to_keep=1, output_hidden_states=bool(layers))
            first, ends = output.logits[:, -1].float(), inputs["position_ids"][..., -1:]
            first.argmax(-1).tolist()  # as a user waits for the first token
            prefill = (time.perf_counter() - start) / len(rows)

        with spent.on("forced"):
            mask, cache = inputs["attention_mask"], output.past_key_values
            forced = _forced(model, mask, ends, caches.copied(cache), first, targets)

        with spent.on("decode"):
            start = time.perf_counter()
            said = _decode(model, mask, ends, cache, first, max_new_tokens)
            later = sum(len(ids) - 1 for ids, _ in said)
            decode = (time.perf_counter() - start) / later if later else None

    readings = []
    width = inputs["input_ids"].shape[1]
    for i, (ids, logits) in enumerate(said):
        answer = Answer(
            decoded(processor, ids), ids, logits, prefill, decode if len(ids) > 1 else None, memory.bytes, len(rows)
        )
        visual = {}
        if layers and image_token_ids[i] is not None:
            own = rows[i]["input_ids"][0] == image_token_ids[i]
            visual = {layer: output.hidden_states[layer][i, width - len(own) :][own] for layer in layers}
        readings.append(Reading(answer, forced[i], visual))
    return readings


def pad_left(model: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of inputs out of batches of one; position ids are always among them.

    Raises:
        UsageError: an argument that the adapter of the model does not say how to pad, by name.
    """
    extra = token_rows(model)
    known = {"input_ids", "attention_mask", "position_ids", "mm_encoder_outputs", *extra}
    for name in sorted({name for row in rows for name in row} - known):
        raise UsageError(f"batch_size must be 1 for this model: its adapter does not say how to pad {name}")

    ids = [row["input_ids"][0] for row in rows]
    masks = [row.get("attention_mask", torch.ones_like(row["input_ids"]))[0] for row in rows]
    pad = model.generation_config.pad_token_id
    inputs: dict[str, Any] = {
        "input_ids": _pad(ids, 0 if pad is None else pad),
        "attention_mask": _pad(masks, 0),
        "position_ids": _positions(model, rows),
    }

    # Token types, say: a prompt without pixels has none, and is text throughout.
    for name, (fill, _) in extra.items():
        if any(name in row for row in rows):
            own = [row[name][0] if name in row else torch.zeros_like(row["input_ids"][0]) for row in rows]
            inputs[name] = _pad(own, fill)

    outputs = [row["mm_encoder_outputs"] for row in rows if "mm_encoder_outputs" in row]
    if outputs:
        kinds = {name for each in outputs for name in each}
        inputs["mm_encoder_outputs"] = {
            name: _joined([each[name] for each in outputs if name in each]) for name in sorted(kinds)
        }
    return inputs


def _pad(rows: Sequence[Int[Tensor, "_"]], fill: int) -> Int[Tensor, "B S"]:
    return pad_sequence(list(rows), batch_first=True, padding_value=fill, padding_side="left")


def _positions(model: Any, rows: Sequence[Mapping[str, Any]]) -> Int[Tensor, "... B S"]:
    """Position ids of every row, counted where it brings none; ``[4, B, S]`` where the model's have several axes."""
    own = []
    for row in rows:
        given = row.get("position_ids")
        if given is None:
            given = (row["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
            if adapter_of(model).positions is not None:  # text advances alike along all axes
                given = given.expand(4, *given.shape)
        own.append(given[..., 0, :])

    # `pad_sequence` pads the first axis, which is the prompt's.
    padded = pad_sequence([each.movedim(-1, 0) for each in own], batch_first=True, padding_side="left")
    return padded if padded.ndim == 2 else padded.movedim(-1, 0)


def _joined(outputs: Sequence[Any]) -> Any:
    """The images of several encoder outputs in one, as the plug writes them."""
    pooled = [each.pooler_output for each in outputs]
    fields: dict[str, Any] = {
        "pooler_output": torch.cat(pooled)
        if isinstance(pooled[0], Tensor)
        else [image for own in pooled for image in own]
    }
    if getattr(outputs[0], "deepstack_features", None) is not None:
        layers = zip(*(each.deepstack_features for each in outputs), strict=True)
        fields["deepstack_features"] = [[image for own in layer for image in own] for layer in layers]
    return type(outputs[0])(**fields)


def _forced(
    model: Any,
    mask: Int[Tensor, "B S"],
    ends: Int[Tensor, "... B 1"],
    cache: Any,
    first: Float[Tensor, "B V"],
    targets: Sequence[Int[Tensor, "_"] | None],
) -> list[Float[Tensor, "_ V"] | None]:
    """Logits over the targets: the prompt predicts their first tokens, each of their tokens the one behind it.

    Args:
        cache: of the prompt, used up: the answer itself is decoded on another copy.
    """
    read = [first.new_empty(0).long() if target is None else target[:-1].to(mask.device) for target in targets]
    longest = max(map(len, read))
    if longest == 0:
        return [None if target is None else first[i : i + 1] for i, target in enumerate(targets)]

    ids = pad_sequence(read, batch_first=True)
    there = torch.arange(longest, device=mask.device) < torch.tensor([[len(each)] for each in read], device=mask.device)
    output = model(
        input_ids=ids,
        attention_mask=torch.cat([mask, there.to(mask.dtype)], 1),
        position_ids=ends + torch.arange(1, longest + 1, device=ends.device),
        past_key_values=cache,
        use_cache=True,
    )
    return [
        None if target is None else torch.cat([first[i : i + 1], output.logits[i, : len(target) - 1].float()])
        for i, target in enumerate(targets)
    ]


def _decode(
    model: Any,
    mask: Int[Tensor, "B S"],
    position: Int[Tensor, "... B 1"],
    cache: Any,
    logits: Float[Tensor, "B V"],
    limit: int,
) -> list[tuple[Int[Tensor, "_"], Float[Tensor, "_ V"]]]:
    """(ids, logits) of every row's greedy answer, its end token included; the cache is used up."""
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, device=logits.device, dtype=torch.long).flatten()

    at_work = list(range(len(logits)))
    ids: list[list[Tensor]] = [[] for _ in at_work]
    seen: list[list[Tensor]] = [[] for _ in at_work]
    for step in range(limit):
        chosen = logits.argmax(-1)
        for row, token, scores in zip(at_work, chosen, logits, strict=True):
            ids[row].append(token)
            seen[row].append(scores)

        # A row that has ended leaves: the others need not wait for it, nor carry its cache along.
        going: Bool[Tensor, "b"] = ~torch.isin(chosen, ends)
        places = going.nonzero()[:, 0]
        if step == limit - 1 or len(places) == 0:
            break
        if len(places) < len(at_work):
            cache.batch_select_indices(places)
            at_work = [at_work[place] for place in places.tolist()]
            chosen, mask, position = chosen[places], mask[places], position[..., places, :]

        mask, position = torch.cat([mask, mask.new_ones(len(mask), 1)], 1), position + 1
        output = model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1].float()
    return [(torch.stack(own), torch.stack(scores)) for own, scores in zip(ids, seen, strict=True)]
