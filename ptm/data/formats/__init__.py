"""Formats of sources, a module for each way of storing records: lines of text files, trees of JSON, stores with an index of their own.

`ptm.data.sources.SOURCES` names them.
"""
