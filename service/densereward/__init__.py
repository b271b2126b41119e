"""densereward: a reward-model server that says which tokens earned the reward."""

from importlib.metadata import version

__version__ = version("densereward")
