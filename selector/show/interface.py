"""The page of `selector demo`: a form around `selector.show.demo`, and the only file that imports gradio.

Nothing is fetched from elsewhere while it runs: the fonts are those of the reader's machine, and gradio's analytics,
which would also ask for newer versions, are off.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any, no_type_check

from selector.errors import UsageError
from selector.show.demo import Card, Demo, example, opened, page

CSS = """
.gradio-container { max-width: 1500px !important; margin: 0 auto; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); }
.card { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px 14px; min-width: 0;
  background: var(--background-fill-primary); }
.card h3 { margin: 0; font-size: 1rem; overflow-wrap: anywhere; color: var(--body-text-color); }
.card p { margin: 4px 0 0; overflow-wrap: anywhere; color: var(--body-text-color); }
.card .tokens, .card .note { font-size: .82rem; opacity: .8; }
.card .tokens span { float: right; }
.card img { display: block; height: auto; margin: 0; border-radius: 5px; background: #fff; }
.card .tiles { width: 100%; margin: 8px 0; }
.card .below { display: flex; gap: 12px; align-items: flex-start; }
.card .base { width: 30%; flex: none; }
.card .answer { font-size: 1.05rem; font-weight: 600; margin-top: 0; }
.card .verdict { display: inline-block; padding: 1px 8px; border-radius: 9px; font-size: .8rem; }
.card .verdict.same { background: #d9f2e1; color: #0b5a2a; }
.card .verdict.other { background: #fde2dc; color: #8c1d0c; }
.cards-error { border: 1px solid #c9442c; border-radius: 10px; padding: 10px 14px; margin-bottom: 12px;
  background: #fdeeea; color: #7d1a0b; }
footer { display: none !important; }
"""
INTRODUCTION = """\
## What each selector keeps
**{model}** answers once with every visual token, and once per selector with as many as the slider allows. Kept patches
are clear, dropped ones veiled; the small picture is the base view. Counts are of tokens that reach the language model.
"""


def gradio() -> Any:
    """The library, imported now.

    Raises:
        UsageError: it is not installed; names the extra.
    """
    # Read on import: without it every start would report itself, and ask for the newest version.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as library  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(
            'the demo needs gradio, which is not installed: pip install "visual-token-selector[demo]"'
        ) from error
    return library


def build(demo: Demo, model: str, share: float | int, seed: int = 0, at_once: bool = True) -> Any:
    """The page as gradio's ``Blocks``, not served yet.

    Args:
        demo: what answers.
        model: its name, for the heading.
        share: where the slider stands for a new image: a share of its tokens (a float), or a count.
        seed: of the examples.
        at_once: ask about the first example when the page is opened.
    """
    gr = gradio()
    first = example(0, seed)
    labels = [*demo.selectors]

    # Gradio streams what it recognises as a generator function; wrapped by a run-time type checker, it is none.
    @no_type_check
    def run(path: str | None, question: str, keep: int | float, chosen: list[str]) -> Iterator[str]:
        cards: list[Card] = []
        try:
            for card in demo.cards(path, question, int(keep), chosen):
                cards.append(card)
                yield page(cards)
        except UsageError as error:
            yield page([], str(error))

    def dropped(path: str | None) -> tuple[Any, str]:
        # What was answered about another image goes. The slider follows the new one's number of tokens.
        try:
            full = demo.count(opened(path))
        except UsageError as error:
            return gr.skip(), page([], str(error))
        return gr.Slider(maximum=full, value=start(share, full)), ""

    def another(number: int) -> tuple[int, Any, str, Any]:
        sample = example(number + 1, seed)
        full = demo.count(sample.image)
        return number + 1, sample.image, sample.question or "", gr.Slider(maximum=full, value=start(share, full))

    full = demo.count(first.image)
    with gr.Blocks(title="selector demo", analytics_enabled=False) as blocks:
        gr.Markdown(INTRODUCTION.format(model=model))
        number = gr.State(0)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                image = gr.Image(
                    first.image, label="Image", type="filepath", image_mode=None, format="png", height=260,
                    sources=["upload", "clipboard"], buttons=[], elem_id="image",
                )  # fmt: skip
                more = gr.Button("Another example", size="sm", elem_id="example")
                question = gr.Textbox(first.question, label="Question", lines=1, max_lines=4, elem_id="question")
                keep = gr.Slider(1, full, start(share, full), step=1, label="Visual tokens that stay", elem_id="keep")
                chosen = gr.CheckboxGroup(labels, value=labels, label="Selectors", elem_id="selectors")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column(scale=3, min_width=320):
                cards = gr.HTML(page([]), elem_id="cards")

        # One at a time: there is one model. Of clicks that come meanwhile the last one counts.
        common: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "minimal"}
        inputs = [image, question, keep, chosen]
        gr.on([image.upload, image.clear], dropped, image, [keep, cards], **common)
        more.click(another, number, [number, image, question, keep], **common).then(run, inputs, cards, **common)
        asked = [ask.click, question.submit, keep.release, chosen.input]
        gr.on(asked, run, inputs, cards, trigger_mode="always_last", **common)
        if at_once:
            blocks.load(run, inputs, cards, **common)
    return blocks


def serve(blocks: Any, port: int, share: bool = False) -> str:
    """Starts the server in the background, for this machine alone unless `share`; returns its address.

    Args:
        port: 0 for one that is free.
        share: also open it to the internet, through a tunnel of gradio's.

    Raises:
        UsageError: the port is taken.
    """
    gr = gradio()

    # The default theme would fetch its fonts from the network.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    try:
        _, local, public = blocks.launch(
            server_name="127.0.0.1",
            server_port=port or _free_port(),
            share=share,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise UsageError(f"port must be free, {port} is not: {error}") from error
    return public or local


def start(share: float | int, full: int) -> int:
    """Where the slider stands for an image of `full` tokens.

    Example:
        >>> start(0.25, 200), start(64, 200), start(640, 200)
        (50, 64, 200)
    """
    wanted = round(share * full) if isinstance(share, float) else share
    return max(1, min(wanted, full))


def _free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
