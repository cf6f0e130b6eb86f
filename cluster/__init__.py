"""The composition root: everything that speaks to Ray, and the command line."""
