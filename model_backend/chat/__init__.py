"""The Kimi K2.5 chat format: tokenizer, tool declarations, turns as token ids, dialogues."""
