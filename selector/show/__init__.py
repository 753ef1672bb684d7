"""Pictures of what selectors keep of an image."""
