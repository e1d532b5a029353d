"""Every operation in plain PyTorch: the truth that all other implementations are tested against."""
