"""What is measured on a network while and after it is trained: its features, its speed-ups."""
