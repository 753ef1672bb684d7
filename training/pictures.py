"""Pictures during training: what the selector keeps of a few images, for TensorBoard and Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger

from training.encoders import LlavaNextEncoder, LlavaNextModel, find_model, without_language_layers


class KeptPictures(Callback):
    """Logs a strip per image after every validation: all tokens, then those that the selector keeps.

    Args:
        model: checkpoint folder or hub name of the LLaVA-NeXT whose tower the selector is trained on; None takes that
            of the training's encoder, which must be a `LlavaNextEncoder` or `LlavaNextModel`.
        images: image files; without any, a generated document and a generated scene.
        keep: the budget, see `Budget`.

    >>> from selector import load_selector
    >>> callback = KeptPictures("checkpoints/llava-next-tiny", keep=0.25)
    >>> [strip.size for strip in callback.strips(load_selector("uniform"))]  # of a document and a scene
    [(736, 328), (736, 498)]
    """

    def __init__(
        self, model: str | None = None, images: list[str] | None = None, keep: int | float | str = 0.25
    ) -> None:
        super().__init__()
        self.model, self.images, self.keep = model, images or [], keep
        self._loaded: tuple[Any, Any] | None = None  # with the first picture: a run may end before it needs one

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the model of the training's encoder where none is named."""
        if self.model is None:
            encoder = getattr(pl_module, "encoder", None)
            if not isinstance(encoder, LlavaNextEncoder | LlavaNextModel):
                raise ValueError(
                    f"model of KeptPictures must name a LLaVA-NeXT, the encoder is a {type(encoder).__name__}"
                )
            self.model = encoder.path

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the strips, in one process, and hands them to the loggers that can show them."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return

        strips = self.strips(pl_module.selector)
        for number, strip in enumerate(strips):
            # A name per picture: wandb shows those of one name in one frame, and they differ in size.
            name = f"val/kept/{number}"
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_image(name, [strip], step=trainer.global_step)
                elif isinstance(logger, TensorBoardLogger):
                    pixels = np.asarray(strip.convert("RGB"))
                    logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")

    def strips(self, selector: Any) -> list[Image.Image]:
        """The pictures themselves, one per image; leaves the selector's training mode as it was."""
        from selector.show.gallery import kept_picture

        model, processor = self._vlm()

        # The ranking of inference: in training mode a selector may draw noise.
        was_training = selector.training
        selector.eval()
        strips = [kept_picture(model, processor, image, {"learned": selector}, self.keep) for image in self._shown()]
        selector.train(was_training)
        return strips

    def _shown(self) -> list[Image.Image]:
        from selector.images import open_image
        from selector.tasks.generated import documents, scenes

        if self.images:
            return [open_image(Path(name)) for name in self.images]

        # Of the test stream: pages that are neither trained on nor validated with.
        return [task.page("test", 0, 0).image for task in (documents, scenes)]

    def _vlm(self) -> tuple[Any, Any]:
        """Model and processor; a model of its own, which stays on the CPU, without the language model's layers."""
        if self._loaded is None:
            from transformers import AutoProcessor

            assert self.model is not None  # for the type checker: settled before the training
            path = find_model(self.model, "model")
            model, _ = without_language_layers(path)
            self._loaded = model.eval(), AutoProcessor.from_pretrained(path, backend="pil")
        return self._loaded
