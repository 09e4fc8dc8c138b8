"""The commands of ``thrifty``, one file each: the file's name is the command's, its ``main`` is a ``click.command()``.

A file is imported when its command is called (and all of them for ``thrifty --help``), so torch and what needs it are
imported inside ``main``. A ThriftyError is printed as one message and exits with 2; Ctrl-C exits with 130.
"""
