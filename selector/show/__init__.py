"""Pictures of what is kept."""
