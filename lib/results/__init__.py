"""The numbers: CSVs of our runs, of the literature and of the clock, and how they are read.
Imports no torch.
"""
