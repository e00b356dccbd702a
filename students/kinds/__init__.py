"""Kinds of routers, one file each: valid settings, place in a model, compute cost and start from calibration."""
