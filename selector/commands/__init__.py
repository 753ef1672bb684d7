"""The commands behind `selector.cli`, one a file: they load, run, draw and print; measuring is done elsewhere."""
