"""The torch engine: one packed forward pass through a transformers model, no padding, no attention maps."""
