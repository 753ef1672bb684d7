"""The classes that lmms-eval runs: ``python -m lmms_eval --model selector_llava_next --model_args pretrained=...``.

Prompts are those of its own ``llava_hf``: the model's chat template, and no cutting at stop texts (``until``), so that
at ``keep=1.0`` the answers are the plain model's. Unlike there, nothing that fails becomes an empty answer.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # pyright: ignore[reportMissingImports]
from lmms_eval.protocol import ChatMessages  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]
from PIL import Image
from tqdm import tqdm

from selector.budget import Budget, Newlines, Scope
from selector.commands.loading import check_positions, find_device, find_folder, load_selectors
from selector.lmms.answers import Answerer, Reply, turns
from selector.plug import SelectionLog
from selector.pruning import Positions

DEFAULTS = {"max_new_tokens": 1024, "temperature": 0, "top_p": None, "num_beams": 1}
"""Of ``llava_hf``, where a task does not say."""
UNUSED = {"until", "do_sample", "image_aspect_ratio", "image_sizes"}
"""Settings of tasks that ``llava_hf`` does not use either; any other that is not used is named in a warning."""


@dataclass
class MeasuredTokens(TokenCounts):
    """Token counts of a request, in lmms-eval's own log of samples (``--log_samples``).

    Attributes:
        visual_tokens: per image, those that reached the language model; `input_tokens` has them too.
        all_visual_tokens: per image, before selection.
    """

    visual_tokens: tuple[int | float, ...] = ()
    all_visual_tokens: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, those that are not known left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class SelectorSimple(lmms):
    """Tasks of lmms-eval's simple kind (``--force_simple``): a question and its images; multiple choice by loss, too.

    Args:
        pretrained: a folder or a hub name of a model with an adapter (`selector.models`).
        selector: a spec (`selector.registry`); in quotes where it holds a comma.
        keep: what stays of an image's visual tokens, see `Budget`: 320 is a count, 0.25 a share, 1.0 everything.
        scope, newlines: see `Budget`.
        positions: see `selector.pruning.prune_inputs`.
        revision: of a model on the hub.
        device: by default a GPU where there is one, under torchrun or accelerate the process's own.
        dtype: of the weights, "auto" that of the checkpoint.
        device_map, attn_implementation: as in ``from_pretrained``.
        batch_size: prompts per batch. In batches of more than one, rounding may change an answer.
        max_batch_size: of lmms-eval's command line; must be left out.

    Raises:
        UsageError: a selector or a device that is not there.
        ValueError: a budget or a batch size out of its range.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        selector: str,
        keep: int | float | str,
        scope: Scope = "image",
        newlines: Newlines = "kept_rows",
        positions: Positions = "original",
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or max_batch_size is not None:
            raise ValueError(f"batch_size must be an int >= 1 without max_batch_size, got {batch_size!r}")

        # Everything that may be wrong is looked at before the weights are loaded.
        self.batch_size, self._device = int(batch_size), find_device(device)
        budget = Budget.parse(keep, scope, newlines)
        [(self.label, chosen)] = load_selectors([str(selector).strip("'\"")], self._device).items()

        model, processor = _load(pretrained, revision, self._device, dtype, device_map, attn_implementation)
        self.answerer = Answerer(model, processor, chosen, budget, check_positions(positions))

    @property
    def device(self) -> Any:
        """Where lmms-eval gathers what its processes did."""
        return self._device

    def clean(self) -> None:
        """Lets the weights go: lmms-eval may load a judge next."""
        del self.answerer
        super().clean()

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """The answers to all requests, with measured tokens.

        Raises:
            ValueError: visuals that are no images, and whatever the model or the selector raise.
        """
        asked = [self._asked(request.args) for request in requests]
        settings = [_settings(self._generation(request.args)) for request in requests]
        replies: dict[int, Reply] = {}
        start = time.perf_counter()

        # Only equal settings can share a batch, and only prompts that all have images, or none.
        keys = [(bool(images), given) for (_, images), given in zip(asked, settings, strict=True)]
        with self.answerer.selecting() as log, tqdm(total=len(asked), disable=self.rank != 0, desc="Answering") as bar:
            for batch in _batches(keys, self.batch_size):
                prompts, images = zip(*(asked[place] for place in batch), strict=True)
                answers = self.answerer.generate(prompts, images, settings[batch[0]])
                replies |= dict(zip(batch, answers, strict=True))
                bar.update(len(batch))

        self._report(log, list(replies.values()), time.perf_counter() - start)
        return [_result(replies[place]) for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """As `text`, (loss, whether greedy decoding gives it) of the given answer of each request.

        As lmms-eval has it despite the name, the first is the mean negative log-likelihood: its multiple choice takes
        the lowest. Of the answer's own tokens alone, in nats per token.
        """
        results = []
        with self.answerer.selecting() as log:
            for request in tqdm(requests, disable=self.rank != 0, desc="Scoring"):
                before = len(log.measured)
                context, target, *where = request.args
                doc = self._doc(*where[1:]) if where else None
                images = _images(where[0](doc)) if where else []
                continuation = target if isinstance(target, str) else target(doc)
                prompt = self.answerer.prompt(turns(context, len(images)))
                pair = self.answerer.loss(prompt, continuation, images)

                # Not the bare pair: lmms-eval 0.7.3 turns what is no GenerationResult into a text.
                kept, full = tuple(log.measured[before:]), tuple(log.full[before:])
                results.append(GenerationResult(pair, MeasuredTokens(visual_tokens=kept, all_visual_tokens=full)))

        self._summarize(log)
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """No task of several rounds is supported: lmms-eval demands the method of every model.

        Raises:
            NotImplementedError: always: an empty answer would be scored as if the model had given it.
        """
        raise NotImplementedError("selector_llava_next has no tasks of several rounds")

    def _asked(self, args: tuple[Any, ...]) -> tuple[str, list[Image.Image]]:
        """(prompt, images) of a request."""
        question, _, to_visual, *where = args
        images = _images(to_visual(self._doc(*where)))
        return self.answerer.prompt(turns(question, len(images))), images

    def _generation(self, args: tuple[Any, ...]) -> Mapping[str, Any]:
        """The generation settings of a request."""
        return args[1]

    def _doc(self, doc_id: Any, task: str, split: str) -> Any:
        """A row of a task's data set, where lmms-eval keeps it."""
        return self.task_dict[task][split][doc_id]

    def _report(self, log: SelectionLog, replies: Sequence[Reply], seconds: float) -> None:
        """What was measured over all requests, for the log and for ``throughput`` in lmms-eval's results."""
        self._summarize(log)
        tokens = sum(reply.new_tokens for reply in replies)
        images = max(1, len(log.measured))

        # Means per image: sums would grow with the number of requests.
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / max(seconds, 1e-9),
            additional_metrics={
                "visual_tokens_per_image": sum(log.measured) / images,
                "all_visual_tokens_per_image": sum(log.full) / images,
                "selection_seconds": log.selection_seconds,
                "rank": self.rank,
            },
        )

    def _summarize(self, log: SelectionLog) -> None:
        logger.info(
            f"{self.label}, keep={self.answerer.budget}: {sum(log.measured):,} of {sum(log.full):,} visual tokens of "
            f"{len(log.measured):,} images reached the language model; selection took {log.selection_seconds:.2f} s"
        )


class SelectorChat(SelectorSimple):
    """Tasks of lmms-eval's chat kind, its default: turns of texts and images, as the task puts them.

    Arguments are those of `SelectorSimple`.
    """

    is_simple = False

    def _asked(self, args: tuple[Any, ...]) -> tuple[str, list[Image.Image]]:
        _, to_messages, _, *where = args
        messages = ChatMessages(messages=to_messages(self._doc(*where))).messages

        # Images as they come; the template shows where each stands.
        parts = [part for message in messages for part in message.content if part.type != "text"]
        if other := {part.type for part in parts} - {"image"}:
            raise ValueError(f"messages must hold texts and images, got {', '.join(sorted(other))}")
        said = [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text} if part.type == "text" else {"type": "image"}
                    for part in message.content
                ],
            }
            for message in messages
        ]
        return self.answerer.prompt(said), _images([part.url for part in parts])

    def _generation(self, args: tuple[Any, ...]) -> Mapping[str, Any]:
        return args[2]


def _load(
    pretrained: str, revision: str | None, device: Any, dtype: str, device_map: str | None, attention: str | None
) -> tuple[Any, Any]:
    """A model in evaluation mode, and its processor: the one that ``llava_hf`` takes, so that pixels are the same."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    name = find_folder(pretrained) or pretrained
    given = {"revision": revision, "device_map": device_map, "attn_implementation": attention}
    given = {key: value for key, value in given.items() if value is not None}
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **given)
    processor = AutoProcessor.from_pretrained(name, **({"revision": revision} if revision else {}))
    return (model if device_map else model.to(device)).eval(), processor


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``model.generate`` from those of a task."""
    known = DEFAULTS | {name: value for name, value in given.items() if name in DEFAULTS}
    if unknown := sorted(given.keys() - known.keys() - UNUSED):
        logger.warning(f"generation settings without effect: {', '.join(unknown)}")

    # Without sampling, transformers warns of a temperature.
    sample = known.pop("temperature") > 0
    return known | {"do_sample": sample} | ({"temperature": given["temperature"]} if sample else {})


def _batches(keys: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Places of the keys, equal ones together, at most `size` at a time."""
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(repr(key), []).append(place)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _images(visuals: Any) -> list[Image.Image]:
    """The visuals of a request, if they are all images."""
    visuals = [] if visuals is None else list(visuals)
    for visual in visuals:
        if not isinstance(visual, Image.Image):
            raise ValueError(f"visuals must be PIL images, got {type(visual).__name__}: {visual!r:.80}")
    return visuals


def _result(reply: Reply) -> GenerationResult:
    counts = MeasuredTokens(
        input_tokens=reply.prompt_tokens,
        output_tokens=reply.new_tokens,
        visual_tokens=reply.kept,
        all_visual_tokens=reply.full,
    )
    return GenerationResult(text=reply.text, token_counts=counts)
