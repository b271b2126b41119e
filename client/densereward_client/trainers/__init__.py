"""Adapters for RL trainers, one module each; a module imports its trainer, so import only the one you have."""
