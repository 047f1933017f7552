"""What a study found, to read: pages, tables, TensorBoard, files for machines.

Everything here is made from the study, the lock and the ledger, and can be made again at any time.
Knows neither torch nor Ray.
"""
