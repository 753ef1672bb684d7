"""To the hub and back: the real client against a local stand-in, with card, metadata and pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import serve

from selector import GumbelSelector, Norm, TokenSelector
from selector.hub import push

ROOT = Path(__file__).parent.parent
CARD = """\
---
library_name: visual-token-selector
tags: [visual-token-selection]
model-index:
- name: mine
  results:
  - task: {type: visual-question-answering}
    dataset: {name: documents, type: documents}
    metrics: [{type: accuracy, value: 0.9}]
---
# mine

```python
selector = TokenSelector.from_pretrained("checkpoints/mine")
```

![Score](results.png)
![elsewhere](https://example.org/badge.svg)
"""


@pytest.fixture
def exported(tmp_path):
    """A folder as `selector-train export` writes it, and files that are none of the card's."""
    torch.manual_seed(0)
    folder = GumbelSelector(dim=8, num_patches=16, heads=2).save_pretrained(tmp_path / "mine", CARD, {"steps": 7})
    (folder / "results.png").write_bytes(b"\x89PNG picture")
    (folder / "training.yaml").write_text("seed: 0\n")
    (folder / "notes.txt").write_text("private")
    return folder


def in_a_process(code: str, address: str, home: Path, token: str = "hf_stand_in"):
    """Runs code under the real client with `address` for the hub; what it prints, read as JSON."""
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",  # the hub's storage for large files, which the stand-in has not
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_checkpoint_goes_to_the_hub_and_comes_back(exported, tmp_path):
    """With two processes: one that pushes twice and to a branch, one that loads each of the revisions."""
    pushing = f"""
import json
from selector import TokenSelector
selector = TokenSelector.from_pretrained({str(exported)!r})
first = selector.push_to_hub("mine", private=True, folder={str(exported)!r}, message="First version")
selector.head.bias.data.add_(1)
second = selector.push_to_hub("someone/mine", card="# Changed\\n")
branch = selector.push_to_hub("someone/mine", metadata={{"steps": 8}}, branch="longer")
print(json.dumps([first, second, branch]))
"""
    with serve() as (address, hub):
        urls = in_a_process(pushing, address, tmp_path / "one")
        commits = [url.rpartition("/commit/")[2] for url in urls]
        loading = f"""
import json, sys
from selector import TokenSelector, load_selector
from selector.hub import about
first, second, branch = {commits!r}
bias = lambda revision: TokenSelector.from_pretrained("someone/mine", revision=revision).head.bias.tolist()[0]
missing = None
try:
    TokenSelector.from_pretrained("someone/mine", revision="never")
except FileNotFoundError as error:
    missing = str(error)
bias_of = [bias(first), bias(None), bias("longer")]
spec = load_selector("hf:someone/mine@" + first).head.bias.tolist()[0]
print(json.dumps([bias_of, spec, about("someone/mine", revision="longer")[0], missing]))
"""
        (first, last, branch), spec, metadata, missing = in_a_process(loading, address, tmp_path / "two")

    # What is there, and under which name.
    assert hub.private == {"someone/mine": True}
    assert hub.messages[0] == "First version"
    files = hub.commits["someone/mine"][commits[0]]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors", "results.png", "training.yaml"]
    assert files["results.png"] == (exported / "results.png").read_bytes()
    assert 'TokenSelector.from_pretrained("someone/mine")' in files["README.md"].decode()
    assert files["README.md"].decode() == CARD.replace("checkpoints/mine", "someone/mine")
    assert json.loads(files["config.json"])["metadata"] == {"steps": 7}
    assert (exported / "README.md").read_text() == CARD  # the folder stays as it was

    # What comes back of each revision.
    own = TokenSelector.from_pretrained(exported).head.bias.tolist()[0]
    assert (first, last, branch, spec) == pytest.approx((own, own + 1, own + 1, own))
    assert metadata == {"steps": 8}
    assert "the hub gave none at revision 'never'" in missing


@pytest.mark.slow
def test_the_metadata_is_read_by_the_hubs_own_parser(exported, tmp_path):
    reading = f"""
import json
from huggingface_hub import ModelCard
from selector import TokenSelector
TokenSelector.from_pretrained({str(exported)!r}).push_to_hub("someone/mine", folder={str(exported)!r})
data = ModelCard.load("someone/mine").data
print(json.dumps([data.library_name, [[r.dataset_name, r.metric_type, r.metric_value] for r in data.eval_results]]))
"""
    with serve() as (address, _):
        library, results = in_a_process(reading, address, tmp_path / "home")
    assert library == "visual-token-selector"
    assert results == [["documents", "accuracy", 0.9]]


@pytest.fixture
def no_hub(monkeypatch):
    """Reaching for the hub is an error: what is wrong must be refused before a repository is made."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: pytest.fail("the hub was asked"))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("card", "message"),
    [
        ("# a\n![x](none.png)", r"pictures that are uploaded with it, it shows 'none\.png', and there is no such file"),
        ("# a\n![x](../notes.txt)", r"it shows '\.\./notes\.txt'"),
        ('# a\n<img width="9" src="none.png">', r"it shows 'none\.png'"),
        (CARD.replace("{name: documents, type", "{type"), "metadata that the hub can read"),
        (CARD.replace("- name: mine", "- {"), "metadata that the hub can read"),
    ],
)
def test_a_card_that_would_be_broken_is_refused(exported, card, message):
    (exported.parent / "notes.txt").write_text("a file of the machine")
    with pytest.raises(ValueError, match=message):
        push(TokenSelector.from_pretrained(exported), "someone/mine", card=card, folder=exported)


@pytest.mark.usefixtures("no_hub")
def test_a_card_must_describe_what_is_pushed(exported, tmp_path):
    selector = TokenSelector.from_pretrained(exported)
    with torch.no_grad():
        selector.head.bias.add_(1)
    with pytest.raises(ValueError, match=r"folder must be a checkpoint of the selector, .*mine holds another one"):
        selector.push_to_hub("someone/mine", folder=exported)
    with pytest.raises(ValueError, match="holds another one"):
        Norm().push_to_hub("someone/mine", folder=exported)
    with pytest.raises(ValueError, match="there is no folder"):
        selector.push_to_hub("someone/mine", folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"it shows 'results\.png', and no folder is given"):
        selector.push_to_hub("someone/mine", card=CARD)


def test_a_folder_has_no_revisions(exported):
    with pytest.raises(ValueError, match=r"revision must be of a hub repository, .*mine' is a folder, got 'v1'"):
        TokenSelector.from_pretrained(exported, revision="v1")


def test_the_shipped_cards_can_be_pushed(tmp_path):
    """Every picture they show is there, and the hub can read their metadata."""
    from selector.hub import _beside

    folders = sorted((ROOT / "checkpoints").glob("selector-*"))
    assert folders
    for folder in folders:
        names = {path.name for path in _beside((folder / "README.md").read_text(), folder)}
        assert names == {p.name for p in folder.iterdir() if p.suffix == ".png"} | {"training.yaml"}
