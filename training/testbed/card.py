"""The model card of a testbed checkpoint, written from the measured results alone."""

from __future__ import annotations

from typing import Any

from selector.evaluation.tasks.documents import KEYS

_HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava-next, testbed, visual-token-selection]
---
# llava-next-tiny

A real but very small LLaVA-NeXT (`LlavaNextForConditionalGeneration`, {parameters} parameters), trained from
nothing on generated
documents and scenes. It exists so that visual-token selection can be measured end to end on a CPU: it answers from
its image, so
what a selector removes shows in the answers. It is no general model.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("checkpoints/llava-next-tiny", backend="pil")
model = AutoModelForImageTextToText.from_pretrained("checkpoints/llava-next-tiny").eval()
inputs = processor(images=image, text="USER: <image>\\nwhat is TOTAL? ASSISTANT:", return_tensors="pt")
print(processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

## What it reaches

Exact match of the whole answer, `generate` greedy, all visual tokens, {samples} held-out questions a task (stream
"test", seed {seed});
in brackets the 95% Wilson interval. Blind: the same questions without an image.

| task | with the image | blind |
|---|---|---|
"""

_TAIL = """
By kind of question, with the image: {kinds}.

## How it was made

```
python -m training.testbed --config configs/testbed/tiny.yaml --out checkpoints/llava-next-tiny
```

The settings used lie beside this card (`made-with.yaml`), as does `results.json`. Machine: a 2-core x86-64 CPU (AVX2,
no AMX), fp32, one
thread a stage, shared with other work. Wall time of the
stages in seconds: {seconds}. Tower and reader do not depend on each other and ran at the
same time.

1. tower: a CLIP vision model learns densely what lies under every 8-px patch (character, or colour and shape, and
   objects' centres). The last layer's CLS token tells which of these occur in the tile.
2. reader: a Llama learns alone to answer from symbolic pages (one symbol a patch, packed as LLaVA-NeXT packs them),
   by a curriculum. Its lessons leave out most background slots, at unchanged positions.
3. projector: fitted so that a patch's feature becomes the embedding of its symbol. join: projector and language model
   tuned on pixels, tower frozen; most lessons leave out background slots, the last are whole pages.

The plan in the YAML was extended while watching the curves: the run was stopped and resumed between its phases, and the
file is the sequence that the shipped weights went through. A run from nothing follows the same steps in one go,
but floating-point sums differ with the machine and the number of threads.

Data: `selector.evaluation.tasks.documents` and `scenes`. Training draws pages from random streams of its own; no page
of the held-out stream is seen.

## Geometry

96-px tiles, patches of 8 px (144 tokens a tile), pages of 192x192 (744 visual tokens), 192x96 and 96x192 (444).
Feature layer -2, CLS dropped.

## Limits

- Text must stand near its native scale (capitals about 8 px high, one every 8 px) and be upper case; the keys are
  the {keys} it was trained on, values have 2 to 4 characters.
- Scenes: four shapes and six colours; counts up to 4. Counting is its weak question (see the counts by kind above).
- Other image sizes work technically, but are resized by the processor and read badly; other prompts give nonsense.
- Most lessons leave out background tokens (at unchanged positions), so the model tolerates their loss better than one
  that never saw this.
"""


def card(results: dict[str, Any]) -> str:
    rows, kinds = "", []
    for task in ("documents", "scenes"):
        cells = []
        for way in ("seen", "blind"):
            one = results[task][way]
            low, high = one["interval_95"]
            cells.append(f"{one['accuracy']:.1%} [{low:.1%}, {high:.1%}]")
        rows += f"| {task} | {cells[0]} | {cells[1]} |\n"
        kinds += [f'"{name} ..." {hit}/{of}' for name, (hit, of) in results[task]["seen"]["by_question"].items()]
    seconds = ", ".join(f"{stage} {value:.0f}" for stage, value in results["wall_seconds"].items())
    head = _HEAD.format(parameters=f"{results['parameters']:,}", samples=results["samples"], seed=results["seed"])
    return head + rows + _TAIL.format(kinds=", ".join(kinds), seconds=seconds, keys=len(KEYS))
