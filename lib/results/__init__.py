"""The numbers: CSVs of runs, of the literature and of the clock. Imports no torch."""
