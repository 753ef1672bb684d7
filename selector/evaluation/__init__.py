"""Comparing selectors: tasks, answers, evidence, consistency, cost; resumable runs and their tables."""
