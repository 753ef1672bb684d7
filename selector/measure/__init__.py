"""Asks the questions and writes records: what was answered, at which cost, and what changed inside."""
