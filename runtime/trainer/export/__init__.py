"""Trained adapters on disk: PEFT folders that servers read, merged bases, model cards. Start at `adapter_files`."""
