"""The embedded engine: schedule, run, postprocess."""
