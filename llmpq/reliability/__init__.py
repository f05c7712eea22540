"""Keeps finished results safe whatever happens, and notices that a worker is gone.

append_file.py  a file that grows by whole records
journal.py, repair.py  output and journal of a run, and how they are repaired after any end of it
monitor.py      workers watch each other
ending.py       how a process ends early
"""
