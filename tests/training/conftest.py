"""Fixtures shared by the tests of training."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture(scope="module")
def quiet():
    """Lightning's remarks on the machine would bury what a failing test prints."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture
def llava_folder(tmp_path, tiny_model):
    """A tiny random LLaVA-NeXT on disk, with its processor."""
    for part in tiny_model():
        part.save_pretrained(tmp_path / "llava")
    return str(tmp_path / "llava")
