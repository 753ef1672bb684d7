"""The commands behind `selector.cli`, one per file: they load, run, draw and print; measuring is done elsewhere."""
