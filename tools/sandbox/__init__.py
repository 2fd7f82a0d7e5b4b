"""Sandboxes in which agents run code."""
