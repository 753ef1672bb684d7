"""Asks the questions and writes records: what was answered, at what cost, and what changed inside the model."""
