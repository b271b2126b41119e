"""What the tests in this folder share."""

from small_classifier import classifier, tokenizer

__all__ = ["classifier", "tokenizer"]
