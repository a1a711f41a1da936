"""The gateway: the HTTP API in front of an engine, and all that makes it safe to leave on.

Not `serve`: a package of the verb's name would hide the function `llama3v.serve`.
"""
