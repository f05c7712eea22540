"""What keeps finished work whatever happens, and notices that a worker is gone.

append_file.py  a file that grows by whole records
journal.py, mending.py  finished requests, and how they are made to agree after any end of a run
monitor.py      workers watch each other
ending.py       how a process ends early
"""
