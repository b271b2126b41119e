"""Adapters for RL trainers: one module per trainer, which alone imports it, so import only the one you have.

    trl_grpo.py, trl_ppo.py    TRL (shared parts: _trl.py)
    openrlhf.py                OpenRLHF
    verl.py                    verl
    skyrl.py                   SkyRL
    _rewards.py                for all: one response's rewards from a server, summing to the sequence's reward

An adapter does three things:

1. It takes a finished rollout's ids, its response mask, and whether it was cut by length.
2. It gets their token rewards: `_rewards.Rewarder` for one rollout at a time, `_trl.Scorer` for a batch.
3. It puts them where the trainer reads rewards or advantages, at the position of each token.

A failure raises; it never becomes a reward of zero.

A new trainer is one module here and one row of service/docs/trainers.md. Its tests go to tests/trainers and run
in an environment of that trainer's own (`make test-trainers`).
"""
