"""Tasks that are drawn: documents, scenes and charts; what they share is in `drawing`."""
