"""What the training loop (lib/train.py) is made of."""
