"""The commands of the `hearth` program, one module each with `run(arguments) -> exit code`.

`arguments` describes the command line; `__main__` chooses the module. Nothing here is part of the public interface.
"""
