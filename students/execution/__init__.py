"""How a routed model runs: wrappers in front of frozen modules, attention, caches and merging."""
