"""The experience table: rows are samples, columns fields; a task gets a row once, as soon as the row has the fields that the task asks for.

    topic       what a topic is, what a row is
    storage     values, and how much memory they take
    controller  which rows a task may have, has, and is done with
    samplers    which of those it gets next
    admission   how far generation may run ahead of training
    ledger      what survives the process
    table       all topics of a service: waiting, back-pressure, commits
"""
