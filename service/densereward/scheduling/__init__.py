"""Which sequences run together and when: queue, cost and size of a batch. `batcher` comes first."""
