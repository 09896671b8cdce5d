"""From sources of text to batches of arrays: sources -> documents -> pipeline (-> mixture, pack) -> loader.

`batch` is the contract with objectives and needs numpy alone, so this package imports nothing by itself.
"""
