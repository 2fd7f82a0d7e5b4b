"""The Kimi K2.5 network in plain PyTorch."""
