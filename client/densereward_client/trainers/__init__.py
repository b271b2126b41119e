"""Adapters for trainers, one module each: a module needs its trainer, this package nothing."""
