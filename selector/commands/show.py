"""`selector show`: a PNG with a row per image and budget and a panel per selector, and the same in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from selector.commands import loading
from selector.commands.common import choose, load_all, pages, positive, whole
from selector.errors import UsageError
from selector.files import atomic, check_output, output
from selector.images import open_image
from selector.show import gallery, picture
from selector.tasks import check_question
from selector.tasks.sample import Sample


def run(settings: dict[str, Any]) -> int:
    """Draws what each selector keeps of some images, as one PNG; answers, where a question is asked, go below.

    Args:
        settings: by the names of ``DEFAULTS["show"]`` in `selector.cli`, and ``images``, file names.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: a setting out of its range, an image that cannot be read, or a place that cannot be written to.
    """
    # Mistakes in the settings are errors before a model is loaded.
    budgets = loading.parse_budgets(settings["keep"], settings["scope"], settings["newlines"])
    out = Path(settings["out"])
    if out.suffix.lower() != ".png":
        raise UsageError(f"out must be the name of a PNG file, got {settings['out']!r}")
    if out.is_dir():
        raise UsageError(f"out must be the name of a PNG file, {settings['out']!r} is a folder")
    check_output(out.parent)

    question = None if settings["question"] is None else check_question(settings["question"])
    samples = [Sample(name, open_image(Path(name)), question, None, ()) for name in settings.get("images", [])]
    samples = samples or [_asked(page, question) for page in pages(whole("seed", settings["seed"]))]

    limit = positive("max_new_tokens", settings["max_new_tokens"])
    positions = loading.check_positions(settings["positions"])

    model, processor, selectors = load_all(settings, choose(settings))

    strips = []
    for sample in samples:
        for strip, words in gallery.strips(
            model,
            processor,
            selectors,
            budgets,
            sample,
            max_new_tokens=limit,
            positions=positions,
            scores=settings["scores"],
        ):
            strips.append(strip)
            for line in words:
                print(line)

    page = picture.stack(strips, heading=f"{settings['model']}: what stays of the visual tokens")
    with output(out), atomic(out) as partial:
        page.save(partial)

    print(f"{out}: {page.width} x {page.height}, {len(strips)} rows of {len(selectors) + 1} panels")
    return 0


def _asked(page: Sample, question: str | None) -> Sample:
    """A generated page with the user's question in place of its own, whose answer and boxes it does not share."""
    return page if question is None else replace(page, question=question, answer=None, boxes=())
