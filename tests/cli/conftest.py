"""A saved tiny model, and the command line called within the process."""

from __future__ import annotations

import pytest

from selector import cli


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def model(tiny_model, saved):
    """Folder of a tiny random LLaVA-NeXT."""
    folder = saved / "tiny"
    if not folder.is_dir():
        built, processor = tiny_model()
        built.save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """``call("compare", ...)`` in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()  # saving the model leaves a progress bar behind
        code = cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run
