"""Continual-learning runs: methods x data x seeds from configuration files; `python -m fused_ewclora demo --suite`."""
