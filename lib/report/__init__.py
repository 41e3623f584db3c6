"""The report on all runs, as PDF and HTML, from the saved CSVs.  Imports no torch."""
