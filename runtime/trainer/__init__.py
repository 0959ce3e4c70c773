"""Training of LoRA adapters under tensor, pipeline, expert and data parallelism. Start at `loop.train`."""
