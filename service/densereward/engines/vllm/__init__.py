"""vLLM as an engine: its client runs here, and attention rows come from its workers."""
