"""What a person sees of a training run: progress, logs, the loss curve, FLOPs, and the dry run's tables."""
