"""EleutherAI's lm-evaluation-harness: students as models of it, files of questions as tasks of it."""
