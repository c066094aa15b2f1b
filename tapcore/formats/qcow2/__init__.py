"""qcow2, versions 2 and 3. Specification: https://www.qemu.org/docs/master/interop/qcow2.html

    layout.py      structures; the header, parsed and validated
    mapping.py     guest offset → extents, over cached tables
    packed.py      compressed clusters
    refcounts.py   which host clusters are in use; allocation
    commit.py      the order in which metadata reaches the file
    driver.py      the driver: open, read, flush, close
    changes.py     the driver's other half: writes, zeroes, discards that change the mapping
    create.py      a new image
    check.py       errors and leaks; refcounts rebuilt
"""
