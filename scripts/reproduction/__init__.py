"""What scripts/reproduce.py stands on: the paper's rows, how each is run, the queue, results and their page.

``rows`` is the table. ``systems`` has a module for each host: its commands, and what is read from its files. ``job``,
``execution`` and ``supervision`` run one row; ``queueing``, ``starting``, ``worker`` and ``environment`` many, one
after the other, from an environment of their own. ``results`` defines the files that are left, ``page`` and ``figure``
what is made of them. ``facts``, ``check_commands`` and ``dense_baseline`` are programs of their own.
"""
