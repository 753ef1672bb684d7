"""One method per file, named after it: ``svd_prune.py`` holds the selector called ``svd-prune``."""
