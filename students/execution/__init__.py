"""How a routed model runs: wrappers around frozen modules, attention, key/value caches, recorded steps."""
