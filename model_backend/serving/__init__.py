"""Launches SGLang servers and keeps them running."""
