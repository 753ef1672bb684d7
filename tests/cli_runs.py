"""Arguments and folders of small runs of the command line, for its tests."""

from __future__ import annotations

import json

from PIL import Image

SMALL = ["--selectors", "svd-prune:rank=2", "random", "--keep", "0.5", "9", "--samples", "2", "--max-new-tokens", "2"]


def folder(path, names, broken=()):
    path.mkdir()
    rows = []
    for i, name in enumerate(names):
        Image.new("RGB", (60 + i, 50), (i, 200, 90)).save(path / name)
        if name in broken:
            (path / name).write_bytes(b"not an image")
        rows.append({"image": name, "qa": [{"q": "what?", "a": "red", "boxes": [[5, 5, 20, 20]]}]})
    (path / "annotations.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
