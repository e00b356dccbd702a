"""Parts of the training loop: budgets, dial, schedule, loading, checkpoints, and the cache of teacher outputs."""
