"""A pull by a process that has been there: the imports of a pull take longer than its requests.

``obdlab serve snapshotter`` keeps a process that has imported all that a pull needs and does nothing
(:mod:`~obdlab.cli.prefork.forkserver`). ``obdlab image pull`` hands it the command line, the environment, the working
directory and the standard files (:mod:`~obdlab.cli.prefork.asking`): a fork runs the command as it would have run.
"""
