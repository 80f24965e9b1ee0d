"""Files that others made, read within limits: text, JSON, YAML, tensors.

Whatever is wrong with such a file ends in a `FileError`, which callers turn into the error of what
they wanted of it. Nothing here runs code of a file, or writes.
"""
