"""The benchmarks behind `tools/bench`.

    outcome.py     figures of a row; ratios
    servers.py     ours and the peers, as processes
    subjects.py    what is served: a raw file, a qcow2 image, a chain of ten
    nbd.py         fio over NBD
    logscan.py     looking at a log
    replication.py copying a disk as fast as it goes
    migration.py   moving a disk that is written to, over a limited link
    runs.py        one copy of those
    copiers.py     ours and the peers that copy: processes.py, qmp.py
    load.py        the guest meanwhile
    link.py        network namespaces and the limited link
    disks.py       the disks that are copied
    chart.py       ratios as SVG
    report.py      table and JSON
"""
