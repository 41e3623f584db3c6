"""The report on all runs, as PDF and HTML, from the saved CSVs.  Imports no torch.

`text/` holds the prose, `facts` what it may quote, `prose` how it is checked; `compose` puts
sections, figures and tables in order; `typeset` and `page` render them; `report` writes the files.
"""
