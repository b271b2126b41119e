"""Measurements of the embedded model and of the methods, on labelled texts: scripts, never part of the server."""
