"""Limits on what is read from files of strangers, so that none costs more than a bounded memory.

They lie far above any data set in use; each error that names one says how to mend the file.
"""

# Bytes of one file, unpacked. Its text and what is read from it take a few times as much memory.
MOST_BYTES = 2**30
# A packed file may be this many times smaller than its text, or have this many bytes of text:
# text is packed 3 to 10 times, and zeros of a gigabyte 1,000 times.
MOST_RATIO = 100
FREE_BYTES = 2**26
# Rows of one file, and values of one JSON file: each takes 100 bytes or more of memory.
MOST_ROWS = 10_000_000
MOST_VALUES = 25_000_000
MOST_COLUMNS = 1_000
# Characters of one text, such as a cell or a message: about a million tokens.
MOST_CHARACTERS = 4_000_000
# Lists and objects in one another, and digits of one number.
MOST_NESTED = 64
MOST_DIGITS = 400
