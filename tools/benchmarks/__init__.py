"""The benchmarks behind `tools/bench`.

    outcome.py     figures of a row; ratios
    servers.py     ours and the peers, as processes
    subjects.py    what is served: a raw file, a qcow2 image, a chain of ten
    nbd.py         fio over NBD
    logscan.py     looking at a log
    report.py      table and JSON
"""
