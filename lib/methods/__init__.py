"""What `lib/masking.py` is made of, and the rules of other methods; it imports all of them."""
