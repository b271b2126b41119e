"""The embedded default reward model: its training, its evaluation, and the folder it is served from."""

from densereward.default_model.build import DefaultModelError, ensure_default_model

__all__ = ["DefaultModelError", "ensure_default_model"]
