"""Tiny models of every supported architecture, made in the test."""
