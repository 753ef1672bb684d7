"""Prompts and generation under the plug, for its tests."""

from __future__ import annotations

import torch

PROMPT = "USER: <image>\nwhat is shown? ASSISTANT:"


def batch(processor, images, texts):
    return processor(images=images or None, text=texts, return_tensors="pt", padding=True)


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **kwargs)


def measured(model, inputs):
    with torch.no_grad():
        model(**inputs)
