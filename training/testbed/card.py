"""The model card of a testbed checkpoint: a fixed text about how it is made, with the measured figures filled in."""

from __future__ import annotations

from typing import Any

from selector.tasks import GENERATED
from selector.tasks.generated import documents

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava-next, testbed, visual-token-selection]
---
# llava-next-tiny

A real but very small LLaVA-NeXT (`LlavaNextForConditionalGeneration`, {parameters} parameters), trained from
scratch on generated documents, charts and scenes and on windows of real scanned receipts. It exists so that
visual-token selection can be measured end to end on a CPU: it answers from its image, so what a selector removes shows
in the answers. It is no general model.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("checkpoints/llava-next-tiny", backend="pil")
model = AutoModelForImageTextToText.from_pretrained("checkpoints/llava-next-tiny").eval()
inputs = processor(images=image, text="USER: <image>\\nwhat is TOTAL? ASSISTANT:", return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## What it reaches

Greedy `generate` on {samples} held-out questions per task (stream "test", seed {seed}); in brackets the 95% Wilson
interval. Right: exact match of the whole answer with all visual tokens. Base view: with the downscaled view alone (the
first quarter of the questions), so how much needs no detail. Blind: the same questions without an image.

| task | right | ANLS | base view | blind |
|---|---|---|---|---|
"""

_TAIL = """
By kind of question:

{kinds}

## How it was made

```
python -m training.testbed --config configs/testbed/tiny.yaml --out checkpoints/llava-next-tiny
```

The settings used lie beside this card (`made-with.yaml`), as does `results.json`. Machine: a 2-core x86-64 CPU (AVX2,
no AMX), fp32, shared with other work; one thread per stage, two processes where the YAML says `parts: 2`. Tower and
reader do not depend on each other and can run at the same time.

- Wall time of the stages in seconds: {seconds}.
- Tokens per second in training, where it was logged (of the tower patches; of reader and join text and those visual
  slots that are not left out): {speeds}.

1. tower: a CLIP vision model learns densely what lies under every 8-px patch (character, or colour and shape, and
   objects' centres). The last layer's CLS token tells which of these occur in the tile.
2. reader: a Llama learns alone to answer from symbolic pages (one symbol per patch, packed as LLaVA-NeXT packs them),
   by a curriculum. Its lessons leave out most background slots, at unchanged positions.
3. projector: fitted so that a patch's feature becomes the embedding of its symbol. join: projector and language model
   tuned on pixels; in some rounds the tower learns too. Most lessons leave out background slots, the last are whole
   pages.

{notes}

Data: `selector.tasks`. Training draws pages from random streams of its own; values and layouts of the
held-out stream never occur in it, and `receipts` (windows of scanned receipts, ICDAR2019-SROIE, CC BY 4.0) are split by
company.

Every point of the curves lies in `log.jsonl`:

![Loss and accuracy while training](curves.png)

## Geometry

96-px tiles, patches of 8 px (144 tokens per tile), pages of 192x192 (744 visual tokens), 192x96 and 96x192 (444).
Feature layer -2, CLS dropped.

## Limits

- Text must stand near its native scale (8 to 11 px from character to character). The keys of `documents` are the {keys}
  it was trained on, values have 2 to 4 characters.
- Scenes: four shapes and six colours; counts up to 4.
- Other image sizes work technically, but are resized by the processor and read badly; other prompts give nonsense.
- Most lessons leave out background tokens (at unchanged positions), so the model tolerates their loss better than one
  that never saw this.
"""


def _cell(one: dict[str, Any]) -> str:
    """Accuracy with its interval: "92.0% [90.1%, 93.6%]"."""
    low, high = one["interval_95"]
    return f"{one['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def card(results: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        results: as `make` gathers them: those of `evaluate`, parameters, wall seconds, tokens per second and notes.
    """
    rows, kinds = "", []

    for task in GENERATED:
        one = results[task]
        # Receipts need data that is not part of the package; a card says so instead of leaving the row out.
        if "skipped" in one:
            rows += f"| {task} | not measured: {one['skipped']} | | | |\n"
            continue

        # Only texts read from scans are scored by ANLS.
        anls = f"{one['seen']['anls']:.1%}" if one["anls"] else "–"
        rows += f"| {task} | {_cell(one['seen'])} | {anls} | {_cell(one['base'])} | {_cell(one['blind'])} |\n"

        asked = [f'"{kind} ..." {hit}/{of}' for kind, (hit, of) in one["seen"]["by_question"].items()]
        kinds.append(f"- {task}: {', '.join(asked)}")

    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in results["wall_seconds"].items())
    speeds = ", ".join(f"{stage} {value:,.0f}" for stage, value in results["tokens_per_s"].items())

    head = _HEAD.format(parameters=f"{results['parameters']:,}", samples=results["samples"], seed=results["seed"])
    tail = _TAIL.format(
        kinds="\n".join(kinds), seconds=seconds, speeds=speeds, keys=len(documents.KEYS), notes=results["notes"].strip()
    )
    return head + rows + tail
