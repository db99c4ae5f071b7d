"""A first run from nothing: real weights and a small real data set out of package registries, and a picture at the end.

`assets` fetches, `emoji` makes the records, `picture` draws what a query found. Nothing else in the package needs it.
"""
