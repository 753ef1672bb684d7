"""How `checkpoints/llava-next-tiny` is made from scratch: tower, reader, join, evaluation (see `make`)."""
