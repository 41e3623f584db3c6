"""What is fast, measured: `python -m lib bench` and its topics, on CPU and GPU."""
