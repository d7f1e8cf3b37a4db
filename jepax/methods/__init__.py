"""One file, one method. A file `NAME.py` is found by its path: it offers `build(run, ...)`.

To add a method, write `jepax/methods/NAME.py` and a config whose `method.name` is 'NAME'.
"""
