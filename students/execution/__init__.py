"""How a routed model runs: wrappers around frozen modules, attention, caches, merging."""
