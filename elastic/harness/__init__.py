"""Adapters for EleutherAI's lm-evaluation-harness: students as its models, files of questions as its tasks."""
