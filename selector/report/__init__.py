"""Reads records and shows what they say: tables, a page, standings. Imports neither torch nor `selector.measure`."""
