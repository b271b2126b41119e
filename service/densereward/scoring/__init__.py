"""From a request to its answer: its plan, its samples, and its rewards on the right tokens. `pipeline` comes first."""
