"""Other libraries and formats: their networks into ours, and ours into theirs."""
