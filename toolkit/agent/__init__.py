"""The only code that runs on a device: one zipapp of standard library, NumPy and the runtime itself.

It reads one JSON document from standard input and writes JSON lines to standard output. It runs on Python 3.8
and imports nothing else of this project.
"""

PROTOCOL = 1
