"""Kinds of routers: what each is in specifications, calibration and counted compute, and where it is put in."""
