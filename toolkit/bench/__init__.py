"""What the host does with raw measurements."""
