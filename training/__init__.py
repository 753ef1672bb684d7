"""Training of learned selectors on frozen vision-encoder features; see ``selector-train --help``."""
