"""`python -m training.testbed --config configs/testbed/tiny.yaml --out checkpoints/llava-next-tiny`"""

from __future__ import annotations

from jsonargparse import auto_cli

from training.testbed.make import make

if __name__ == "__main__":
    auto_cli(make, as_positional=False)
