"""The web server that machines ask: what they should be, and for the files of that. It signs nothing and reads no key.

What it hands out is signed, and so is what it is given: whoever takes it over can hold both back, and forge neither.
"""
