"""What other programs load of this package: vLLM's plugin, lm-eval's model and tasks. Each imports its host where it is used."""
