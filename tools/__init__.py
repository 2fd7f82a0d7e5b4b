"""What agents can do: functions, search, IPython."""
