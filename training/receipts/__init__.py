"""Receipts with their text exchanged, for training only."""
