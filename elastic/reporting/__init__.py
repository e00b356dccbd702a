"""Sweep results, and the plots, tables and pages made from them."""
