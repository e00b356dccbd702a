"""Steps of decoding and prompts with images recorded once and replayed: CUDA graphs, or lists of calls on CPUs."""
